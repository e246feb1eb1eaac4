"""The data section: which text, and how it becomes rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from efficientllm.config.fields import Count, Real, Section, Share, Text, one_or_more

_HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+):([^:]*)(?::(.*))?")


class DataSource(Section):
    """Where text comes from. As a string: a path, or a hub id as org/data:name:split."""

    path: Text = Field(description="File, glob, folder saved by datasets, or hub id; relative to the current directory")
    name: str | None = Field(default=None, description="Configuration of a hub data set")
    split: str | None = Field(default=None, description="Split of a hub data set")
    weight: Real = Field(default=1.0, gt=0, description="Share of the tokens, relative to the other sources")
    text_column: Text | None = Field(default=None, description="Column with the text; null: data.text_column")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        data = {"path": data} if isinstance(data, str) else data
        hub_id = _HUB_ID.fullmatch(str(data.get("path"))) if isinstance(data, Mapping) else None
        if hub_id is None:
            return data
        parts = {"path": hub_id[1], "name": hub_id[2], "split": hub_id[3]}
        for key in ("name", "split"):
            if parts[key] and data.get(key):
                raise ValueError(f"{key} stands in the path {data['path']!r} and as a key: keep one of them")
        return {**data, **{key: part for key, part in parts.items() if part}}


DataSources = Annotated[tuple[DataSource, ...], Field(min_length=1), BeforeValidator(one_or_more)]


class DataConfig(Section):
    """The corpus: tokenised once, cut into rows, cached."""

    section: ClassVar[str] = "data"
    train: DataSources = Field(description="Text to train on: one source or a list of them")
    validation: DataSources | None = Field(
        default=None, description="Held-out text; null: validation_fraction of the documents of train"
    )
    validation_fraction: Share = Field(
        default=0.005, gt=0, lt=0.5, description="Share of the documents that is held out"
    )
    text_column: Text = Field(default="text", description="Column with the text")
    sequence_length: Count = Field(default=1024, ge=8, description="Tokens in a row")
    cache_dir: Text | None = Field(
        default=None,
        description="Folder for tokenised text; null: $EFFICIENTLLM_CACHE, or ~/.cache/efficientllm",
    )
    workers: Count | None = Field(default=None, description="Processes that tokenise; null: one per core")

    def _idle(self) -> dict[str, str]:
        return {} if self.validation is None else {"validation_fraction": "beside data.validation"}
