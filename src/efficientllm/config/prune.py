"""The prune section: how far, when, and by what scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from efficientllm.config.fields import (
    AutoPlace,
    Count,
    Momentum,
    Real,
    Section,
    Share,
    Text,
    one_or_more,
    union_side,
)
from efficientllm.config.targets import CostTarget, Rung, Target, WidthTarget
from efficientllm.errors import UsageError
from efficientllm.sizes import parse_count


class AlignConfig(Section):
    """Multiples that widths are rounded to: up while running, within the target at the end."""

    hidden: Count = Field(default=1, description="Multiple for the hidden width")
    intermediate: Count = Field(default=1, description="Multiple for the FFN width")


class LatencyOnConfig(Section):
    """What prune.latency_table must have been measured on; null leaves it open."""

    section: ClassVar[str] = "prune.latency_on"
    device: Literal["cpu", "cuda"] | None = Field(default=None, description="The device that the result is for")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="Of its weights there")


class FloorsConfig(Section):
    """The least that is kept of each width; null: a third of the proportional shape at the target."""

    layers: Count = Field(default=1, description="Layers")
    hidden: Count | None = Field(default=None, description="Residual channels; null: a third of the proportional shape")
    kv_heads: Count | None = Field(default=None, description="Key-value heads; null: likewise, at least one")
    heads_per_kv: Count | None = Field(default=None, description="Query heads of a key-value head; null: likewise")
    intermediate: Count | None = Field(default=None, description="FFN channels; null: likewise")


def _several(value: object) -> object:
    return value if value is None else one_or_more(value)


def _align(value: object) -> object:
    """One multiple stands for both widths; auto and a mapping pass."""
    if value == "auto" or isinstance(value, Mapping | BaseModel):
        return value
    try:
        return dict.fromkeys(("hidden", "intermediate"), parse_count(value))
    except ValueError:
        mend = "write auto, a multiple such as 64, or {hidden: 64, intermediate: 128}"
        raise ValueError(f"{value!r} is no alignment: {mend}") from None


Align = Annotated[
    Annotated[Literal["auto"], Tag("<plain>")] | Annotated[AlignConfig, Tag("<widths>")],
    Discriminator(union_side),
    BeforeValidator(_align),
]
PruningType = Literal["attention", "attention_query", "ffn", "stem", "depth"]
DEFAULT_TYPES: tuple[PruningType, ...] = ("attention", "attention_query", "ffn", "stem")


INPUT_CRITERIA = frozenset({"wanda", "flap", "activation", "sparsegpt"})  # they look at correction_tokens too


class PruneConfig(Section):
    """How far, when and by what scores the model is pruned while it trains."""

    section: ClassVar[str] = "prune"
    target: Target = Field(
        description="Size to reach: parameters (469M), a ratio (40%), widths (a mapping), or a size in prune.cost"
    )
    cost: Literal["params", "flops", "kv-cache", "latency"] = Field(
        default="params", description="What target, schedule and choice count: damage is weighed per unit of it"
    )
    latency_table: Text | None = Field(
        default=None, description="File of `efficientllm bench MODEL --table FILE`, for prune.cost latency"
    )
    latency_on: LatencyOnConfig = Field(
        default=LatencyOnConfig(), description="Device and dtype that the table must have been measured with"
    )
    ladder: Annotated[tuple[Rung, ...] | None, BeforeValidator(_several)] = Field(
        default=None, description="Sizes on the way, largest first; each leaves a model to use and to train on"
    )
    mode: Literal["loop", "one-shot", "iterative"] = Field(
        default="loop",
        description="loop: while training; one-shot: at once; iterative: step by step with the weights at rest",
    )
    calibration_batches: Count = Field(default=8, description="Batches to come that one-shot takes its scores from")
    order: Literal["saliency", "attention-first", "ffn-first", "stem-first", "interleaved"] = Field(
        default="saliency", description="Which type falls next; the others are pruning paths to widths given as target"
    )
    start: AutoPlace = Field(
        default="auto",
        description="Where pruning starts; auto: at the end of warm-up, with mode one-shot or iterative at once, since "
        "their warm-up follows pruning",
    )
    end: AutoPlace = Field(
        default="auto",
        description="Where the target is reached; auto: after 15 % of the run, but no fewer than 20 steps, as far as "
        "half of the run allows",
    )
    every: Count | None = Field(
        default=None, description="The paper's N: one event every N batches until the target, in place of end"
    )
    curve: Literal["linear", "cubic", "cosine", "exponential"] = Field(
        default="cubic", description="Size over tokens between start and end; cubic cuts fast first"
    )
    lr: Share = Field(
        default=1.0,
        gt=0,
        description="Share of the learning rate while pruning; below 1, its tokens are no warm-up",
    )
    saliency: Text = Field(default="taylor-element", description="Name of the score of a unit")
    ema: Momentum = Field(
        default=0.5, description="What a look at the scores still counts in their average once bound has fallen since"
    )
    types: Annotated[tuple[PruningType, ...], Field(min_length=1), BeforeValidator(one_or_more)] = Field(
        default=DEFAULT_TYPES, description="What may fall; attention_query needs a GQA model, depth takes whole layers"
    )
    selection: Literal["calibrated", "raw"] = Field(
        default="calibrated", description="Compare types by measured loss, or by scores as they are"
    )
    bound: Share = Field(
        default=0.05, gt=0, description="Most of the parameters that fall between two looks at the scores"
    )
    calibration_tokens: Count | None = Field(
        default=None, description="Tokens to measure loss on; null: an eighth of the batch, between 512 and 8,192"
    )
    correction: Literal["none", "second-order"] = Field(
        default="second-order", description="Let what is left of a layer make up for the inputs that it loses"
    )
    correction_tokens: Count | None = Field(
        default=None,
        description="Tokens whose inputs the correction, and criteria that need inputs, see at most; null: eight for "
        "each input of the widest layer",
    )
    correction_damping: Real = Field(default=0.01, ge=0, description="Of its Hessian, as a share of the mean diagonal")
    correction_tolerance: Real = Field(default=0.03, gt=0, description="Relative residual at which its solve is done")
    correction_iterations: Count = Field(default=100, description="Most iterations of its solve")
    align: Align = Field(default="auto", description="auto, one multiple, or one for hidden and intermediate each")
    floors: FloorsConfig = Field(default=FloorsConfig(), description="The least that is kept of each width")
    compact_at: Share = Field(
        default=0.04, gt=0, description="Zeroed share of the parameters at which tensors are cut to size"
    )

    def _idle(self) -> dict[str, str]:
        idle = {} if self.selection == "calibrated" else {"calibration_tokens": "with prune.selection raw"}
        if self.cost != "latency":
            idle |= dict.fromkeys(["latency_table", "latency_on"], f"with prune.cost {self.cost}")
        if self.order != "saliency":
            idle |= dict.fromkeys(["selection", "calibration_tokens"], f"with prune.order {self.order}")
        if self.mode != "loop":
            idle |= dict.fromkeys(["end", "curve", "every"], f"with prune.mode {self.mode}, which sets its own pace")
            idle["lr"] = f"with prune.mode {self.mode}, which leaves the weights at rest while it prunes"
        if self.mode == "one-shot":
            idle["bound"] = "with prune.mode one-shot"
        else:
            idle["calibration_batches"] = f"with prune.mode {self.mode}"
        if self.correction == "none":
            names = ["damping", "tolerance", "iterations"]
            if self.saliency not in INPUT_CRITERIA:
                names.append("tokens")
            idle |= dict.fromkeys([f"correction_{name}" for name in names], "with prune.correction none")
        if self.every is not None and self.mode == "loop":
            idle |= dict.fromkeys(["end", "curve"], "beside prune.every, which sets the pace by itself")
        return idle

    @model_validator(mode="before")
    @classmethod
    def _target_of_ladder(cls, data: Any) -> Any:
        """A ladder without a target ends with its last size; a last rung that is the target is not left twice."""
        if not isinstance(data, Mapping) or data.get("ladder") is None:
            return data
        ladder = data["ladder"]
        ladder = list(ladder) if isinstance(ladder, list | tuple) else [ladder]
        if ladder and data.get("target") in (None, ladder[-1]):
            data = {**data, "target": ladder[-1], "ladder": ladder[:-1] or None}
        return data

    @model_validator(mode="after")
    def _path_has_an_end(self) -> Self:
        if self.order != "saliency" and not isinstance(self.target, WidthTarget):
            raise UsageError(
                f"prune.order {self.order} needs a shape to go to: give prune.target as widths, such as "
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
