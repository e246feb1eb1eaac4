"""The prune section: how far, when, and by what scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from efficientllm.config.fields import (
    AutoCount,
    AutoPlace,
    Count,
    Idle,
    Section,
    Share,
    Text,
    Trait,
    one_or_more,
)
from efficientllm.config.gone import CALIBRATED, GONE
from efficientllm.config.targets import CostTarget, Milestone, Target, WidthTarget
from efficientllm.errors import UsageError
from efficientllm.pruning.criteria import DEFAULT, criteria_of
from efficientllm.pruning.dimensions import DEFAULT_TYPES, EXPERT_TYPES, VOCAB
from efficientllm.sizes import parse_count


class FloorsConfig(Section):
    """The least that is kept of each width; null: a third of the proportional shape at the target."""

    section: ClassVar[str] = "prune.floors"
    layers: Count = Field(default=1, description="Layers")
    hidden: Count | None = Field(default=None, description="Residual channels; null: a third of the proportional shape")
    kv_heads: Count | None = Field(default=None, description="Key-value heads; null: likewise, at least one")
    heads_per_kv: Count | None = Field(default=None, description="Query heads of a key-value head; null: likewise")
    intermediate: Count | None = Field(default=None, description="FFN channels, of an expert too; null: likewise")
    experts: Count | None = Field(default=None, description="Experts; null: likewise, no fewer than a token uses")


def _several(value: object) -> object:
    return value if value is None else one_or_more(value)


def _align(value: object) -> object:
    """A multiple, or auto; a mapping, which was once one for each width, is told what to write."""
    if value == "auto":
        return value
    if isinstance(value, Mapping):
        raise ValueError(GONE["prune.align.hidden"].instead)
    try:
        return parse_count(value)
    except ValueError:
        raise ValueError(f"{value!r} is no alignment: write auto, or a multiple such as 64") from None


def _saliency(value: object) -> object:
    """A name, or a mapping of pruning types to names, all of them known."""
    if not isinstance(value, str | Mapping) or not value:
        raise ValueError(f"{value!r} is no criterion: write a name such as flap, or one by type, such as {{ffn: flap}}")
    criteria_of(value, ())
    return value


def _selection(value: object) -> object:
    """auto is what raw was called where scores are in nats."""
    if value == "calibrated":
        raise ValueError(CALIBRATED)
    return "raw" if value == "auto" else value


PruningType = Literal["attention", "attention_query", "ffn", "stem", "depth", "expert", "expert_ffn", "vocab"]
Selection = Literal["raw", "attention-first", "ffn-first", "stem-first", "interleaved"]
AT_REST = Idle(lambda prune: prune.mode != "loop", "with prune.mode {0.mode}, which sets its own pace")
PACED = Idle(
    lambda prune: prune.every is not None and prune.mode == "loop",
    "beside prune.every, which sets the pace by itself",
)


class PruneConfig(Section):
    """How far, when and by what scores the model is pruned while it trains."""

    section: ClassVar[str] = "prune"
    target: Annotated[Target, Trait.ARM] = Field(
        description="Size to reach: parameters (469M), a ratio (40%), widths (a mapping), or a size in prune.cost"
    )
    cost: Annotated[Literal["params", "active", "flops", "kv-cache", "latency"], Trait.ARM] = Field(
        default="params", description="What target, schedule and choice count: damage is weighed per unit of it"
    )
    latency_table: Annotated[Text | None, Idle(lambda prune: prune.cost != "latency", "with prune.cost {0.cost}")] = (
        Field(default=None, description="File of `efficientllm bench MODEL --table FILE`, for prune.cost latency")
    )
    ladder: Annotated[tuple[Milestone, ...] | None, BeforeValidator(_several), Trait.ARM] = Field(
        default=None, description="Sizes on the way, largest first; each leaves a model to use and to train on"
    )
    mode: Annotated[Literal["loop", "one-shot", "iterative"], Trait.ARM] = Field(
        default="loop",
        description="loop: while training; one-shot: at once; iterative: step by step with the weights at rest",
    )
    start: AutoPlace = Field(
        default="auto",
        description="Where pruning starts; auto: at the end of warm-up, with mode one-shot or iterative at once, since "
        "their warm-up follows pruning",
    )
    end: Annotated[AutoPlace, AT_REST, PACED] = Field(
        default="auto",
        description="Where the target is reached; auto: 15 % of the run after prune.start, no fewer than 20 steps, "
        "within the first half",
    )
    every: Annotated[Count | None, AT_REST] = Field(
        default=None, description="The paper's N: one event every N batches until the target, in place of end"
    )
    curve: Annotated[Literal["linear", "cubic", "cosine", "exponential"], AT_REST, PACED] = Field(
        default="cubic", description="Size over tokens between start and end; cubic cuts fast first"
    )
    saliency: Annotated[str | dict[str, str], Trait.ARM, BeforeValidator(_saliency)] = Field(
        default=DEFAULT,
        description="Name of the score of a unit, or one for each type, such as {ffn: flap}; types that are not named "
        "have the default",
    )
    types: Annotated[tuple[PruningType, ...], Field(min_length=1), BeforeValidator(one_or_more)] = Field(
        default=cast(tuple[PruningType, ...], DEFAULT_TYPES),
        description="What may fall; attention_query needs a GQA model, depth takes whole layers, vocab tokens, beside "
        "other types. The default is, of a mixture of experts, expert and expert_ffn in place of ffn",
    )
    selection: Annotated[Selection, BeforeValidator(_selection)] = Field(
        default="raw",
        description="Which type falls next: by scores as they are, per unit of prune.cost (raw), or by one of the "
        "pruning paths to widths given as target",
    )
    bound: Annotated[Share, Idle(lambda prune: prune.mode == "one-shot", "with prune.mode one-shot")] = Field(
        default=0.05, gt=0, description="Most of the parameters that fall between two looks at the scores"
    )
    rotate: Annotated[
        Literal["off", "auto"], Idle(lambda prune: "stem" not in prune.types, "where prune.types leaves out stem")
    ] = Field(
        default="off",
        description="auto: turn the residual stream into its principal components before the first step, where that "
        "changes no logits (an LM head of its own, no norms at the end of sublayers)",
    )
    correction: Annotated[Literal["none", "second-order"], Trait.ARM] = Field(
        default="second-order", description="Let what is left of a layer make up for the inputs that it loses"
    )
    align: Annotated[AutoCount, BeforeValidator(_align)] = Field(
        default="auto",
        description="Multiple that the hidden and the FFN width are rounded to: up while running, within the target at "
        "the end; auto: the largest power of two up to 128 that leaves 32 steps of a width",
    )
    floors: FloorsConfig = Field(default=FloorsConfig(), description="The least that is kept of each width")

    @property
    def units(self) -> tuple[str, ...]:
        """The types of the table (pruning/dimensions.py) among prune.types."""
        return tuple(name for name in self.types if name != VOCAB)

    @property
    def vocabulary(self) -> bool:
        """Whether tokens may fall."""
        return VOCAB in self.types

    @property
    def path(self) -> str | None:
        """The pruning path to widths given as target; None where scores choose the type."""
        return None if self.selection == "raw" else self.selection

    @model_validator(mode="before")
    @classmethod
    def _target_of_ladder(cls, data: Any) -> Any:
        """A ladder without a target ends with its last size; a last milestone that is the target is not left twice."""
        if not isinstance(data, Mapping) or data.get("ladder") is None:
            return data
        ladder = data["ladder"]
        ladder = list(ladder) if isinstance(ladder, list | tuple) else [ladder]
        if ladder and data.get("target") in (None, ladder[-1]):
            data = {**data, "target": ladder[-1], "ladder": ladder[:-1] or None}
        return data

    @model_validator(mode="after")
    def _path_has_an_end(self) -> Self:
        if self.path is not None and not isinstance(self.target, WidthTarget):
            raise UsageError(
                f"prune.selection {self.path} needs a shape to go to: give prune.target as widths, such as "
                "{hidden: 512, heads: 8, intermediate: 1408}"
            )
        if self.ladder and isinstance(self.target, WidthTarget):
            raise UsageError("prune.ladder needs a size as prune.target, not widths")
        return self

    @model_validator(mode="after")
    def _sizes_are_in_its_cost(self) -> Self:
        key = self.cost.replace("-", "_")
        sizes = [(f"prune.ladder[{index}]", size) for index, size in enumerate(self.ladder or ())]
        for name, size in [*sizes, ("prune.target", self.target)]:
            counted = size.cost if isinstance(size, CostTarget) else "params"
            if isinstance(size, WidthTarget) or counted == self.cost:
                continue
            if self.cost == "params":
                raise UsageError(f"{name} is in {counted}, but prune.cost counts params: set prune.cost: {counted}")
            raise UsageError(
                f"prune.cost is {self.cost}, but {name} is in {counted}: write it as {{{key}: 40%}}, or "
                "set prune.cost to what it is in"
            )
        if self.cost == "latency" and self.latency_table is None:
            raise UsageError(
                "prune.cost latency needs prune.latency_table, measured on the device by `efficientllm bench MODEL "
                "--table FILE`"
            )
        return self

    @model_validator(mode="after")
    def _distinct_types(self) -> Self:
        twice = next((name for name in self.types if self.types.count(name) > 1), None)
        if twice:
            raise UsageError(f"prune.types names {twice} more than once: drop the repetition")
        return self

    @model_validator(mode="after")
    def _tokens_fall_beside_others(self) -> Self:
        if not self.vocabulary:
            return self
        if not self.units:
            raise UsageError("prune.types has vocab alone, which falls beside other types: add the default ones")
        if isinstance(self.target, WidthTarget):
            raise UsageError("prune.types has vocab, which has no width: give prune.target as a size, such as 40%")
        if self.cost in ("kv-cache", "latency"):
            raise UsageError(f"prune.types has vocab, which prune.cost {self.cost} does not count: leave it out")
        return self

    @model_validator(mode="after")
    def _scores_are_of_its_types(self) -> Self:
        named = self.saliency if isinstance(self.saliency, Mapping) else {}
        known = (*self.units, *EXPERT_TYPES) if self.units == DEFAULT_TYPES else self.units
        idle = next((name for name in named if name not in known), None)
        if idle:
            raise UsageError(f"prune.saliency.{idle} has no effect: {idle} is not in prune.types")
        return self
