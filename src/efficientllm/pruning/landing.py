"""Where the run may end: the aligned shapes just under the target, and which events still lead to one of them.

A greedy run could paint itself into a corner: a head is a large step, an aligned width a coarse one. So the
shapes in which it may end are listed before it starts, and an event is allowed only while one of them is
still within reach (no width of it above what is left). Following allowed events always ends in such a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientllm.pruning.costs import Cost, Params
from efficientllm.pruning.groups import ATTENTION, ATTENTION_QUERY, DEPTH, FFN_TYPE, STEM, Space, Widths

TOLERANCE = 0.01


@dataclass(frozen=True)
class Floors:
    """The least that is kept of each width."""

    hidden: int
    layers: int = 1
    kv_heads: int = 1
    queries_per_kv: int = 1
    intermediate: int = 32


@dataclass(frozen=True)
class Alignment:
    """Multiples that hidden and intermediate widths are rounded to (up while running, to land at the end)."""

    hidden: int = 1
    intermediate: int = 1

    @classmethod
    def automatic(cls, widths: Widths) -> Alignment:
        """The largest power of two up to 128 that leaves at least 32 steps of a width; 1 for tiny widths.

        Coarser steps leave so few shapes within 1 % of the target that alignment, not saliency, would choose the
        architecture (docs/results/ablations.md).
        """

        def fit(width: int) -> int:
            return max((step for step in (2, 4, 8, 16, 32, 64, 128) if step * 32 <= width), default=1)

        return cls(fit(widths.hidden), fit(widths.intermediate))

    def round_up(self, live: Widths, allocated: Widths) -> Widths:
        """Live widths with hidden and intermediate rounded up, never above what is allocated."""

        def up(width: int, step: int, most: int) -> int:
            return min(-(-width // step) * step, most)

        return Widths(
            live.layers,
            up(live.hidden, self.hidden, allocated.hidden),
            live.heads,
            live.kv_heads,
            up(live.intermediate, self.intermediate, allocated.intermediate),
        )


def amount(value: float) -> str:
    """A whole number with its thousands apart, any other to four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _multiples(low: int, high: int, step: int) -> Tensor:
    """Aligned widths from low to high, and `high` itself, which is what the source has."""
    values = set(range(-(-low // step) * step, high + 1, step)) | {high}
    return torch.tensor(sorted(values))


class Landing:
    """All shapes in which a run may end that is to cost at most `target` (parameters, or what `cost` counts).

    For every (layers, hidden, KV heads, queries per KV head) on the grid, the range of aligned intermediate widths
    whose cost lies in ((1 - tolerance) * target, target]. Where alignment leaves no shape in that band, those that
    come nearest from below are the only ones, and `gap` says by how much they miss.

    Raises ValueError, one sentence with the mend, when the target is not between the floors and the source.
    """

    def __init__(
        self,
        space: Space,
        target: float | Widths,
        *,
        types: tuple[str, ...],
        align: Alignment,
        floors: Floors,
        tolerance: float = TOLERANCE,
        cost: Cost | None = None,
    ) -> None:
        self.space, self.align, self.tolerance = space, align, tolerance
        self.cost: Cost = cost or Params(space)
        source = space.widths
        if isinstance(target, Widths):
            self._check_widths(target, types, floors)
            self.target: float = self.cost(target)
            pin = target
            floors = Floors(pin.hidden, pin.layers, pin.kv_heads, pin.queries_per_kv, pin.intermediate)
            align = Alignment()  # for the list of shapes; self.align still rounds up while the run goes on
        else:
            self.target, pin = target, source
        grids = (
            _multiples(floors.layers if DEPTH in types else source.layers, pin.layers, 1),
            _multiples(floors.hidden if STEM in types else source.hidden, pin.hidden, align.hidden),
            _multiples(floors.kv_heads if ATTENTION in types else source.kv_heads, pin.kv_heads, 1),
            _multiples(
                floors.queries_per_kv if ATTENTION_QUERY in types else source.queries_per_kv,
                pin.queries_per_kv,
                1,
            ),
        )
        self.layers, self.hidden, self.kv, self.queries = (
            grid.flatten() for grid in torch.meshgrid(*grids, indexing="ij")
        )
        self._axes = grids
        low = floors.intermediate if FFN_TYPE in types else source.intermediate
        self.ffn = _multiples(low, pin.intermediate, align.intermediate)
        self._band(tolerance)

    def _check_widths(self, target: Widths, types: tuple[str, ...], floors: Floors) -> None:
        source = self.space.widths
        least = {
            DEPTH: ("layers", floors.layers),
            STEM: ("hidden", floors.hidden),
            ATTENTION: ("kv_heads", floors.kv_heads),
            ATTENTION_QUERY: ("queries per KV head", floors.queries_per_kv),
            FFN_TYPE: ("intermediate", floors.intermediate),
        }
        for pruning_type, (name, floor) in least.items():
            have, want = source.count(pruning_type), target.count(pruning_type)
            if want > have:
                raise ValueError(f"target {name} {want} is above the source's {have}; choose at most {have}")
            if want < have and pruning_type not in types:
                raise ValueError(f"target {name} {want} needs pruning type '{pruning_type}' in prune.types")
            if want < min(floor, have):
                raise ValueError(
                    f"target {name} {want} is below its floor of {floor}; lower prune.floors or aim higher"
                )
        if target == source:
            raise ValueError("the target widths are the source's own; there is nothing to prune")

    def _costs(self, index: Tensor) -> Tensor:
        """Cost of each grid point at the intermediate width of that index into `self.ffn`."""
        heads = self.kv * self.queries
        shape = Widths(self.layers, self.hidden, heads, self.kv, self.ffn[index])  # type: ignore[arg-type]
        return torch.as_tensor(self.cost(shape))

    def _first_index(self, wanted: Callable[[Tensor], Tensor]) -> Tensor:
        """Per grid point the first index into `self.ffn` at which the cost is `wanted`, as all above it are; the
        number of widths where none is."""
        low = torch.zeros_like(self.hidden)
        high = torch.full_like(low, len(self.ffn))
        while bool((low < high).any()):
            middle = (low + high) // 2
            found = wanted(self._costs(middle.clamp(max=len(self.ffn) - 1))) | (low == high)
            low, high = torch.where(found, low, middle + 1), torch.where(found, middle, high)
        return low

    def _band(self, tolerance: float) -> None:
        """Indices into `self.ffn`: the first and last intermediate width of each grid point inside the band."""
        source, unit, target = self.cost(self.space.widths), self.cost.unit, self.target
        smallest = self._costs(torch.zeros_like(self.hidden)).min().item()
        if target >= source:
            raise ValueError(
                f"the target of {amount(target)} {unit} is not below the source's {amount(source)}; aim lower"
            )
        if target < smallest:
            raise ValueError(
                f"the target of {amount(target)} {unit} is below {amount(smallest)}, the least that the floors and the "
                "pruning types allow; aim higher, lower prune.floors or add types"
            )
        self.last = self._first_index(lambda costs: costs > target) - 1
        best = self._costs(self.last.clamp(min=0))[self.last >= 0].max().item()
        under = (1.0 - tolerance) * target
        self.lowest = min(best, int(under) + 1 if isinstance(target, int) else under)
        self.first = self._first_index(lambda costs: costs >= self.lowest)
        self.gap = 1.0 - best / target

    def shape(self) -> Widths:
        """The final shape, where there is only one (a target given as widths)."""
        (at,) = (self.first <= self.last).nonzero().flatten().tolist()
        kv_heads = int(self.kv[at])
        return Widths(
            int(self.layers[at]),
            int(self.hidden[at]),
            kv_heads * int(self.queries[at]),
            kv_heads,
            int(self.ffn[self.first[at]]),
        )

    def balanced(self) -> Widths:
        """The final shape whose narrowest width, as a share of the source's, is the widest; ties to the first. What a
        run will choose is saliency's to say."""
        source, inside = self.space.widths, self.first <= self.last
        ffn = self.ffn[self.last.clamp(min=0)]
        shares = torch.stack(
            [
                self.layers / source.layers,
                self.hidden / source.hidden,
                self.kv / source.kv_heads,
                self.queries / source.queries_per_kv,
                ffn / source.intermediate,
            ]
        )
        at = int(torch.where(inside, shares.min(0).values, -1.0).argmax())
        kv_heads = int(self.kv[at])
        heads = kv_heads * int(self.queries[at])
        return Widths(int(self.layers[at]), int(self.hidden[at]), heads, kv_heads, int(ffn[at]))

    def least(self, pruning_type: str) -> int:
        """Units of one type in each of its rows in the narrowest shape listed: its floor, where it may fall."""
        grids = dict(zip((DEPTH, STEM, ATTENTION, ATTENTION_QUERY), self._axes, strict=True)) | {FFN_TYPE: self.ffn}
        return int(grids[pruning_type][0])

    def may_fall(self, pruning_type: str, widths: Widths) -> bool:
        """Whether the type is above its floor, and one event of it keeps a final shape within reach."""
        return widths.count(pruning_type) > self.least(pruning_type) and self.reachable(widths.after(pruning_type))

    def mean_saving(self, pruning_type: str) -> float:
        """What one event of a type saves on its way from the source's width to its floor, the other widths as in the
        source; 0 where there is no way to go."""
        source = self.space.widths
        events = source.count(pruning_type) - self.least(pruning_type)
        if events <= 0:
            return 0.0
        return float(self.cost(source) - self.cost(source.after(pruning_type, events))) / events

    def least_ffn(self, layers: Tensor, hidden: Tensor, kv: Tensor, queries: Tensor) -> Tensor:
        """Per shape, the least FFN width from which a final shape is within reach; a huge one where none is."""
        none = torch.iinfo(torch.int64).max
        least = torch.where(self.first <= self.last, self.ffn[self.first.clamp(max=len(self.ffn) - 1)], none)
        table = least.view([len(axis) for axis in self._axes])
        for dim in range(len(self._axes)):
            table = table.cummin(dim).values
        places = [
            torch.searchsorted(axis, widths.contiguous(), right=True) - 1
            for axis, widths in zip(self._axes, (layers, hidden, kv, queries), strict=True)
        ]
        inside = torch.stack(places).min(0).values >= 0
        return torch.where(inside, table[tuple(place.clamp(min=0) for place in places)], none)

    def before(self, following: Landing) -> None:
        """Keeps only shapes from which `following` is within reach. Raises ValueError where none is left."""
        if following.target >= self.lowest:
            sizes = f"{amount(self.target)} and {amount(following.target)}"
            raise ValueError(f"sizes {sizes} share shapes; choose sizes further apart")
        need = following.least_ffn(self.layers, self.hidden, self.kv, self.queries)
        self.first = torch.maximum(self.first, torch.searchsorted(self.ffn, need))
        if not bool((self.first <= self.last).any()):
            raise ValueError(
                f"no shape of {amount(self.target)} {self.cost.unit} leads on to {amount(following.target)}; choose "
                "sizes further apart"
            )

    def reachable(self, widths: Widths) -> bool:
        """Whether some final shape has no width above these."""
        fits = (self.layers <= widths.layers) & (self.hidden <= widths.hidden)
        fits &= (self.kv <= widths.kv_heads) & (self.queries <= widths.queries_per_kv)
        most = int(torch.searchsorted(self.ffn, torch.tensor(widths.intermediate), right=True)) - 1
        return bool((fits & (self.first <= self.last.clamp(max=most))).any())

    def reached(self, widths: Widths) -> bool:
        """Whether these widths are a final shape."""
        here = (self.layers == widths.layers) & (self.hidden == widths.hidden)
        here &= (self.kv == widths.kv_heads) & (self.queries == widths.queries_per_kv)
        at = int(torch.searchsorted(self.ffn, torch.tensor(widths.intermediate), right=True)) - 1
        on_grid = at >= 0 and int(self.ffn[at]) == widths.intermediate
        return on_grid and bool((here & (self.first <= at) & (at <= self.last)).any())
