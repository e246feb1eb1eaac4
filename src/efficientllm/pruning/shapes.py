"""Shapes that a person would choose, the steps of their widths, and how far below them a run may look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from efficientllm.pruning.costs import axes_of
from efficientllm.pruning.dimensions import of_type
from efficientllm.pruning.groups import MULTIPLE, Space
from efficientllm.pruning.widths import Widths


@dataclass(frozen=True)
class Floors:
    """The least that is kept of each width."""

    hidden: int = 1
    layers: int = 1
    kv_heads: int = 1
    queries_per_kv: int = 1
    intermediate: int = 1
    experts: int = 1
    expert_intermediate: int = 1

    def of(self, pruning_type: str) -> int:
        """In units of one type in each of its rows."""
        return int(getattr(self, of_type(pruning_type).width))


@dataclass(frozen=True)
class Alignment:
    """Multiples that hidden and intermediate widths (of experts too) are rounded to: up while running, to land at the
    end."""

    hidden: int = 1
    intermediate: int = 1

    @classmethod
    def automatic(cls, widths: Widths, least: int = 1) -> Alignment:
        """The largest power of two up to 128 that leaves at least 32 steps of a width; `least` for tiny widths.

        Coarser steps leave so few feasible shapes that alignment, not saliency, would choose the architecture
        (docs/results/ablations.md).
        """

        def fit(width: int) -> int:
            return max(
                (step for step in (2, 4, 8, 16, 32, 64, 128) if step * 32 <= width and step > least), default=least
            )

        return cls(fit(widths.hidden), fit(widths[axes_of(widths)[-1]]))

    def _multiple(self, width: str) -> int:
        """1 for heads, layers and experts."""
        return int(getattr(self, width.removeprefix("expert_"), 1))

    def step(self, pruning_type: str) -> int:
        """The multiple for the width that a pruning type narrows."""
        return self._multiple(of_type(pruning_type).width)

    def round_up(self, live: Widths, allocated: Widths) -> Widths:
        """Live widths rounded up to their multiples, never above what is allocated."""
        rounded = {}
        for name, count in live.counts().items():
            step = self._multiple(name)
            rounded[name] = min(-(-count // step) * step, allocated[name])
        return Widths.of(rounded)


def fits(space: Space, widths: Any) -> Any:
    """Whether a model of these widths can be saved for others; elementwise where their fields are int64 tensors."""
    hidden, heads = widths.hidden, widths.heads
    if space.hidden_rule is None:
        return heads == heads
    return hidden % heads == 0 if space.hidden_rule == MULTIPLE else hidden // heads == space.hidden_rule


def fitted(space: Space, widths: Widths, allocated: Widths) -> Widths:
    """The smallest shape that fits, no width of it below these or above the allocated ones, which fit."""
    if fits(space, widths):
        return widths
    found = allocated
    for kv_heads in range(widths.kv_heads, allocated.kv_heads + 1):
        for queries in range(widths.queries_per_kv, allocated.queries_per_kv + 1):
            heads = kv_heads * queries
            least = (
                -(-widths.hidden // heads) * heads
                if space.hidden_rule == MULTIPLE
                else heads * int(space.hidden_rule or 1)
            )
            wider = widths.changed(hidden=max(widths.hidden, least), heads=heads, kv_heads=kv_heads)
            if (
                wider.hidden <= allocated.hidden
                and fits(space, wider)
                and space.num_params(wider) < space.num_params(found)
            ):
                found = wider
    return found


def proportional_widths(
    space: Space, limit: float, size: Callable[[Widths], float] | None = None, *, least: Widths | None = None
) -> Widths:
    """The widest shape of at most `limit` whose hidden, heads, experts and FFN keep the source's proportions.

    size: what the limit counts, such as a cost of pruning/costs.py; default: parameters. least: no width becomes
    narrower than here. Heads are whole, groups of query heads stay as large, layers stay. Raises ValueError where
    nothing fits.
    """
    size = size or space.num_params
    source = space.widths
    least = least or Widths.of({of_type(each).width: space.least(each) for each in source.types()})
    for hidden in range(source.hidden, 0, -1):
        scale = hidden / source.hidden
        scaled = {name: max(least[name], round(scale * have)) for name, have in source.counts().items()}
        widths = Widths.of(scaled | {name: source[name] for name in ("layers", "queries_per_kv")})
        if size(widths) <= limit and fits(space, widths):
            return widths
    raise ValueError(
        f"no proportional shape has at most {limit:,} {getattr(size, 'unit', 'parameters')}: raise the target"
    )


def third_of(shape: Widths, hidden_step: int, intermediate_step: int) -> Floors:
    """A third of each width but the layers, hidden and FFN (of experts too) rounded down to their alignment; at least
    1."""
    steps = {"hidden": hidden_step, "intermediate": intermediate_step, "expert_intermediate": intermediate_step}
    thirds = {name: max(1, have // 3 // (step := steps.get(name, 1)) * step) for name, have in shape.counts().items()}
    return Floors(**(thirds | {"layers": 1}))
