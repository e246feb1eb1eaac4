"""The data section: which text, and how it becomes rows."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from efficientllm.config.fields import Count, Real, Section, Share, Text, Trait, one_or_more

_HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+):([^:]*)(?::(.*))?")
_SHARE = re.compile(r"\s*[\d.]+([eE][+-]?\d+)?\s*%?\s*")  # PyYAML reads 1e-3 as text


class DataSource(Section):
    """Where text comes from. As a string: its path."""

    section: ClassVar[str] = "data.train[]"
    path: Text = Field(
        description="File, glob, folder saved by datasets (relative to the current directory), or hub id, as "
        "org/data:name:split where it has several; of Megatron's .bin and .idx either"
    )
    weight: Real = Field(default=1.0, gt=0, description="Share of the tokens, relative to the other sources")
    text_column: Text = Field(
        default="text",
        description="Column with texts, conversations or token ids; without a column text: messages or input_ids, "
        "where there is one",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    @property
    def place(self) -> str:
        """The path without the name and split of a data set."""
        return self._part(1) or self.path

    @property
    def name(self) -> str | None:
        """Configuration of a hub data set."""
        return self._part(2)

    @property
    def split(self) -> str | None:
        return self._part(3)

    def _part(self, number: int) -> str | None:
        match = _HUB_ID.fullmatch(self.path)
        return (match[number] or None) if match else None


def _validation_side(value: object) -> str:
    """Tag of the side of the union: a share of the documents, or sources."""
    share = isinstance(value, int | float) or (isinstance(value, str) and _SHARE.fullmatch(value))
    return "<plain>" if share else "<sources>"


DataSources = Annotated[tuple[DataSource, ...], Field(min_length=1), BeforeValidator(one_or_more)]
Validation = Annotated[
    Annotated[Share, Field(gt=0, lt=0.5), Tag("<plain>")] | Annotated[DataSources, Tag("<sources>")],
    Discriminator(_validation_side),
]


class DataConfig(Section):
    """The corpus: tokenised once, cut into rows, cached."""

    section: ClassVar[str] = "data"
    train: DataSources = Field(description="Text to train on: one source or a list of them")
    validation: Validation = Field(
        default=0.005, description="Held-out text, as data.train; or the share of the documents of train to hold out"
    )
    sequence_length: Count = Field(default=1024, ge=8, description="Tokens in a row")
    within_documents: bool = Field(
        default=False,
        description="Attention stays within a document, and positions restart there; false: it crosses the documents "
        "of a row, as in most pretraining",
    )
    cache_dir: Annotated[Text | None, Trait.FREE] = Field(
        default=None,
        description="Folder for tokenised text; null: $EFFICIENTLLM_CACHE, or ~/.cache/efficientllm",
    )
    workers: Annotated[Count | None, Trait.FREE] = Field(
        default=None, description="Processes that tokenise; null: one per core"
    )

    @property
    def held_out(self) -> float | None:
        """Share of the documents of train that is held out; None where validation has sources of its own."""
        return self.validation if isinstance(self.validation, float) else None

    @property
    def validation_sources(self) -> tuple[DataSource, ...]:
        return () if isinstance(self.validation, float) else self.validation
