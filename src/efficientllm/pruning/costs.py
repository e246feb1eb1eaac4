"""What a shape costs: parameters (all, active), KV-cache bytes, latency. Pruning buys much of it for little damage.

A cost is a pure function of the widths and never falls when a width grows (but for rounding in the last bits; along
the FFN's width, which feasible.py searches, not even by that). The one cost of a run serves everything
that weighs or counts: an event's damage is divided by it (selection.py), the final shapes lie under a target in it
(feasible.py), and the schedule says how much of it may be left (schedule.py). FLOPs per token are in models/flops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS, of_type
from efficientllm.pruning.groups import Space
from efficientllm.pruning.widths import Widths

KEY_BYTES = 2  # of a key or value: 16 bits, as runtimes keep them
# Axes of a latency table, in the order of its dimensions.
TABLE_AXES = ("layers", "hidden", "kv_heads", "queries_per_kv", "intermediate")
# In the order in which shapes are listed: what has the most units last (feasible.py searches along it).
_AXES = (*TABLE_AXES[:-1], "experts", "intermediate", "expert_intermediate")


def axes_of(widths: Widths) -> tuple[str, ...]:
    """The widths of a model by name: TABLE_AXES, but for a mixture of experts."""
    counts = widths.counts()
    return tuple(axis for axis in _AXES if axis in counts)


def types_along(axes: Sequence[str]) -> tuple[str, ...]:
    """The type that each of these widths narrows with."""
    return tuple(next(row.type for row in DIMENSIONS.values() if row.width == axis) for axis in axes)


AXIS_TYPES = types_along(TABLE_AXES)


def shape_at(place: Sequence[Any], axes: Sequence[str] = TABLE_AXES) -> Widths:
    """Widths from a number for each of the axes; their fields are tensors where the numbers are."""
    return Widths.of(dict(zip(axes, place, strict=True)))


class Cost(Protocol):
    """A price of shapes.

    name: as in `prune.cost`. unit: of its values, for messages. key: equal for costs that price every shape alike.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str: ...

    @property
    def key(self) -> str: ...

    def __call__(self, widths: Any) -> Any:
        """The cost of a model of these Widths: an int (a float where the unit is no count); elementwise, int64 or
        float64, where the fields of `widths` are int64 tensors of one shape."""
        ...


@dataclass(frozen=True)
class Params:
    """Parameters; a tied embedding counts once."""

    space: Space
    name: str = "params"
    unit: str = "parameters"

    @property
    def key(self) -> str:
        return self.name

    def __call__(self, widths: Any) -> Any:
        return self.space.num_params(widths)


@dataclass(frozen=True)
class ActiveParams(Params):
    """Parameters that one token computes with: of a layer's experts those that it uses, and the whole router."""

    name: str = "active"
    unit: str = "active parameters"

    def __call__(self, widths: Any) -> Any:
        return self.space.num_params(widths, active=True)


@dataclass(frozen=True)
class KVCache:
    """Bytes of keys and values that one token leaves in the cache, at 16 bits each."""

    head_dim: int
    name: str = "kv-cache"
    unit: str = "bytes of KV cache per token"

    @property
    def key(self) -> str:
        return self.name

    def __call__(self, widths: Any) -> Any:
        return widths.layers * widths.kv_heads * (2 * self.head_dim * KEY_BYTES)


@dataclass(frozen=True)
class TableCost:
    """Latency in seconds, interpolated linearly in every width between measured shapes.

    grid: of each of TABLE_AXES the widths measured, rising. values: float64 seconds, one dimension an axis, not
    falling along any. key: of the table. Exact at the grid's own shapes. Raises ValueError outside of them.
    """

    grid: tuple[tuple[int, ...], ...]
    values: Tensor
    key: str
    name: str = "latency"
    unit: str = "s"

    def __call__(self, widths: Any) -> Any:
        asked = [torch.as_tensor(getattr(widths, axis)) for axis in TABLE_AXES]
        single = asked[0].ndim == 0
        where = [
            self._place(axis, levels, each) for axis, levels, each in zip(TABLE_AXES, self.grid, asked, strict=True)
        ]
        seconds = self._between(where, ())
        return float(seconds) if single else seconds

    def _place(self, axis: str, levels: Sequence[int], widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(index of the level below, index of the level above, share of the way between them) of each width."""
        if bool(((widths < levels[0]) | (widths > levels[-1])).any()):
            asked = f"{int(widths.min())} to {int(widths.max())}"
            raise ValueError(f"{axis} {asked} lies outside {levels[0]} to {levels[-1]}")
        table = torch.tensor(levels)
        below = (torch.searchsorted(table, widths.contiguous(), right=True) - 1).clamp(0, max(0, len(levels) - 2))
        above = (below + 1).clamp(max=len(levels) - 1)
        span = (table[above] - table[below]).clamp(min=1)
        return below, above, (widths - table[below]).double() / span

    def _between(self, where: Sequence[tuple[Tensor, Tensor, Tensor]], corner: tuple[Tensor, ...]) -> Tensor:
        """Axis by axis, the FFN's last: along that one values never fall by even a bit, since feasible.py searches
        among them. corner: indices along the axes behind this one."""
        axis = len(TABLE_AXES) - 1 - len(corner)
        below, above, share = where[axis]
        if axis == 0:
            low, high = (self.values[(side, *corner)] for side in (below, above))
        else:
            low, high = (self._between(where, (side, *corner)) for side in (below, above))
        if axis < len(TABLE_AXES) - 1:
            return (1.0 - share) * low + share * high
        return torch.where(share == 1.0, high, torch.minimum(low + share * (high - low), high))


SAMPLES = 9  # widths of each axis at which `counts` looks, ends included: more than a table has levels


def counts(cost: Cost, source: Widths, pruning_type: str, least: Widths) -> bool:
    """Whether the cost falls along one type somewhere between the widths `least` and the source's.

    Looked for with the other widths anywhere in between, since noise in a table may have left it flat along the type
    at the source's own. A cost never falls as widths grow, so that both ends of the type tell.
    """
    if source.count(pruning_type) <= least.count(pruning_type):
        return False
    own, names = of_type(pruning_type).width, axes_of(source)
    axes = []
    for axis in names:
        low, high = int(least[axis]), int(source[axis])
        axes.append(torch.tensor([high]) if axis == own else torch.linspace(low, high, SAMPLES).round().long().unique())
    wide = [each.flatten() for each in torch.meshgrid(*axes, indexing="ij")]
    narrow = [
        torch.full_like(each, least.count(pruning_type)) if axis == own else each
        for axis, each in zip(names, wide, strict=True)
    ]
    return bool((cost(shape_at(narrow, names)) < cost(shape_at(wide, names))).any())
