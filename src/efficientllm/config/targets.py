"""Sizes to prune to: a ratio, a parameter count, widths, or a share or an amount of another cost."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, PlainValidator, Tag, model_validator

from efficientllm.config.fields import Count, Section, json_as, union_side
from efficientllm.errors import UsageError
from efficientllm.sizes import Amount, exact_count, format_fraction, parse_count, parse_fraction


class WidthTarget(Section):
    """Widths to prune to, the same in every layer; null keeps the source's width."""

    section: ClassVar[str] = "prune.target"
    layers: Count | None = Field(default=None, description="Layers; fewer need depth in prune.types")
    hidden: Count | None = Field(default=None, description="Residual channels")
    heads: Count | None = Field(default=None, description="Query heads")
    kv_heads: Count | None = Field(default=None, description="Key-value heads")
    intermediate: Count | None = Field(default=None, description="FFN channels; of a mixture of experts those of each")
    experts: Count | None = Field(default=None, description="Experts of a layer, no fewer than a token uses")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_fields_set:
            raise UsageError("prune.target names no width: give one or more of " + ", ".join(type(self).model_fields))
        return self


def _latency(value: object) -> Amount:
    return Amount.parse(value, timed=True)


class CostTarget(Section):
    """A size in what `prune.cost` counts: a share of the source's, or an amount."""

    section: ClassVar[str] = "prune.target"
    active: Annotated[Amount | None, PlainValidator(Amount.parse), json_as(str)] = Field(
        default=None, description="Parameters that a token computes with: of experts those that it uses"
    )
    flops: Annotated[Amount | None, PlainValidator(Amount.parse), json_as(str)] = Field(
        default=None, description="Forward FLOPs of a token, the mean over data.sequence_length"
    )
    kv_cache: Annotated[Amount | None, PlainValidator(Amount.parse), json_as(str)] = Field(
        default=None, description="Bytes of KV cache of a token, at 16 bits a number"
    )
    latency: Annotated[Amount | None, PlainValidator(_latency), json_as(str)] = Field(
        default=None, description="Time of the sequence that prune.latency_table was measured with"
    )

    @property
    def cost(self) -> str:
        """The cost that it is a size in, as in `prune.cost`."""
        return next(iter(self.model_fields_set)).replace("_", "-")

    @property
    def amount(self) -> Amount:
        (name,) = self.model_fields_set
        found: Amount = getattr(self, name)
        return found

    def _idle(self) -> dict[str, str]:
        """The costs that it is not a size in: nothing to refuse, and not dumped."""
        return dict.fromkeys(type(self).model_fields.keys() - self.model_fields_set, "beside the other")

    @model_validator(mode="after")
    def _only_one(self) -> Self:
        if len(self.model_fields_set) != 1:
            names = ", ".join(type(self).model_fields)
            raise UsageError(f"a size to prune to is in one cost: give one of {names}")
        return self


def _target(value: object) -> object:
    """A ratio as float, a parameter count as int; widths pass."""
    if isinstance(value, Mapping | BaseModel):
        return value
    for parse in (parse_fraction, parse_count):
        try:
            size = parse(value)
        except ValueError:
            continue
        if size > 0 and size != 1:
            return size
    raise ValueError(
        f"{value!r} is no size to prune to: write a parameter count such as 469M, a ratio such as 40% or 0.4, "
        "or widths such as {hidden: 512, intermediate: 1408}; for another prune.cost one such as {flops: 40%}"
    )


def _target_side(value: object) -> str:
    """Tag of the side of the union: a size in another cost is known by its key, or the nearest known one."""
    if not isinstance(value, Mapping):
        return "<cost>" if isinstance(value, CostTarget) else union_side(value)
    costs, names = CostTarget.model_fields, [*WidthTarget.model_fields, *CostTarget.model_fields]
    nearest = [match for key in value for match in difflib.get_close_matches(str(key), names, 1)]
    return "<cost>" if nearest and all(name in costs for name in nearest) else "<widths>"


def _milestone_side(value: object) -> str:
    return "<cost>" if isinstance(value, Mapping | BaseModel) else "<plain>"


def _dump_target(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return format_fraction(value) if isinstance(value, float) else exact_count(value)


Target = Annotated[
    Annotated[int | float, Tag("<plain>")]
    | Annotated[WidthTarget, Tag("<widths>")]
    | Annotated[CostTarget, Tag("<cost>")],
    Discriminator(_target_side),
    BeforeValidator(_target),
    json_as(_dump_target),
]
Milestone = Annotated[
    Annotated[int | float, Tag("<plain>")] | Annotated[CostTarget, Tag("<cost>")],
    Discriminator(_milestone_side),
    BeforeValidator(_target),
    json_as(_dump_target),
]
