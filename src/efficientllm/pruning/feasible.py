"""Where the run may end: the feasible final shapes, and whether one of them is still within reach.

A greedy run could paint itself into a corner: a head is a large step, an aligned width a coarse one. So the shapes in
which it may end are listed before it starts, and an event is allowed only while one of them is still within reach (no
width of it above what is left). Following allowed events always ends in such a shape. Which one is damage's to say
(selection.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efficientllm.pruning.costs import Cost, Params, axes_of, shape_at, types_along
from efficientllm.pruning.groups import MULTIPLE, Space
from efficientllm.pruning.shapes import Alignment, Floors, fits
from efficientllm.pruning.widths import Widths

OUT_OF_REACH = torch.iinfo(torch.int64).max


def amount(value: float) -> str:
    """A whole number with its thousands apart, any other to four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _multiples(low: int, high: int, step: int) -> Tensor:
    """Aligned widths from low to high, and `high` itself, which is what the source has."""
    values = set(range(-(-low // step) * step, high + 1, step)) | {high}
    return torch.tensor(sorted(values))


class FeasibleShapes:
    """All shapes in which a run may end that is to cost at most `target` (parameters, or what `cost` counts).

    They are the aligned shapes that are *maximal* under the target: none of their widths can grow by its next step
    (an aligned width, a head, a layer, or to the source's own width) without passing it. Some lie just under it,
    others further, where their steps are large.

    shapes: int64 (number, axes), a column for each of costs.axes_of, the largest first (ties in rising order of the
    columns). sizes: what each of them costs. types: the pruning type that narrows each of the columns.

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
        cost: Cost | None = None,
    ) -> None:
        self.space, self.align, self.floors = space, align, floors
        self.cost: Cost = cost or Params(space)
        source = space.widths
        self._names = axes_of(source)
        self.types = types_along(self._names)
        if isinstance(target, Widths):
            self._check_widths(target, types, floors)
            self.target: float = self.cost(target)
            pin = target
            floors = Floors(**pin.counts())
            align = Alignment()  # for the list of shapes; self.align still rounds up while the run goes on
        else:
            self.target, pin = target, source
        self._axes = tuple(
            _multiples(
                max(floors.of(each), space.least(each)) if each in types else source.count(each),
                pin.count(each),
                align.step(each),
            )
            for each in self.types
        )
        self._keep(self._maximal())

    def _check_widths(self, target: Widths, types: tuple[str, ...], floors: Floors) -> None:
        source = self.space.widths
        for pruning_type, width in zip(self.types, self._names, strict=True):
            name = {"queries_per_kv": "queries per KV head"}.get(width, width)
            have, want = source.count(pruning_type), target.count(pruning_type)
            floor, least = floors.of(pruning_type), self.space.least(pruning_type)
            if want < least:
                raise ValueError(
                    f"target {name} {want} is below the {least} that every token uses; choose at least {least}"
                )
            if want > have:
                raise ValueError(f"target {name} {want} is above the source's {have}; choose at most {have}")
            if want < have and pruning_type not in types:
                raise ValueError(f"target {name} {want} needs pruning type '{pruning_type}' in prune.types")
            if want < min(floor, have):
                raise ValueError(
                    f"target {name} {want} is below its floor of {floor}; lower prune.floors or aim higher"
                )
        if not fits(self.space, target):
            rule = "a multiple of" if self.space.hidden_rule == MULTIPLE else f"{self.space.hidden_rule} times"
            raise ValueError(
                f"target hidden {target.hidden} is not {rule} its {target.heads} heads, as this family needs"
            )
        if target == source:
            raise ValueError("the target widths are the source's own; there is nothing to prune")

    def _maximal(self) -> Tensor:
        """The feasible shapes, in rising order of their columns. The cost rises with every width, so that those under
        the target are closed downwards: a shape of which no single width can take its next step is maximal."""
        *others, ffn = self._axes
        grid = torch.meshgrid(*others, indexing="ij")
        last = torch.where(fits(self.space, self.shape_of([*grid, grid[0]])), self._widest_ffn(grid), -1)
        feasible, best = last >= 0, last  # best: the widest FFN of all shapes that are no narrower elsewhere
        for dim in range(len(others)):
            best = best.flip(dim).cummax(dim).values.flip(dim)
        for dim in range(len(others)):
            here, wider = last.narrow(dim, 0, len(others[dim]) - 1), best.narrow(dim, 1, len(others[dim]) - 1)
            feasible.narrow(dim, 0, len(others[dim]) - 1).logical_and_(wider < here)
        if not bool(feasible.any()):
            raise ValueError(
                f"no shape of at most {amount(self.target)} {self.cost.unit} has a hidden width that fits its heads "
                f"({'a multiple of them' if self.space.hidden_rule == MULTIPLE else 'head_dim times their number'}), "
                "which this family needs; aim lower, or set prune.align to 1"
            )
        return torch.stack([*(each[feasible] for each in grid), ffn[last[feasible]]], dim=1)

    def _widest_ffn(self, grid: tuple[Tensor, ...]) -> Tensor:
        """Index into the FFN's axis of the widest under the target, per grid point; -1 where none is. By bisection."""
        ffn = self._axes[-1]

        def costs(index: Tensor) -> Tensor:
            return torch.as_tensor(self.cost(self.shape_of([*grid, ffn[index]])))

        least, source = costs(torch.zeros_like(grid[0])).min().item(), self.cost(self.space.widths)
        unit, target = self.cost.unit, self.target
        if target >= source:
            raise ValueError(
                f"the target of {amount(target)} {unit} is not below the source's {amount(source)}; aim lower"
            )
        if target < least:
            share = f" (a share is written {target}%)" if isinstance(target, int) and target < 100 else ""
            raise ValueError(
                f"the target of {amount(target)} {unit} is below {amount(least)}, the least that the floors and the "
                f"pruning types allow; aim higher{share}, lower prune.floors or prune.align, or add types"
            )
        low, high = torch.zeros_like(grid[0]), torch.full_like(grid[0], len(ffn))
        while bool((low < high).any()):
            middle = (low + high) // 2
            above = (costs(middle.clamp(max=len(ffn) - 1)) > target) | (low == high)
            low, high = torch.where(above, low, middle + 1), torch.where(above, middle, high)
        return low - 1

    def shape_of(self, place: Sequence[Any]) -> Widths:
        """Widths from a number for each of the columns; their fields are tensors where the numbers are."""
        return shape_at(place, self._names)

    def place(self, widths: Widths) -> list[int]:
        """A number for each of the columns."""
        return [widths[name] for name in self._names]

    def _keep(self, shapes: Tensor) -> None:
        """Lists these shapes, and for every point of the other axes the narrowest FFN from which one is in reach."""
        sizes = torch.as_tensor(self.cost(self.shape_of(shapes.unbind(1))))
        order = sizes.argsort(descending=True, stable=True)
        self.shapes, self.sizes = shapes[order], sizes[order]
        self._listed = set(map(tuple, self.shapes.tolist()))
        table = torch.full([len(axis) for axis in self._axes[:-1]], OUT_OF_REACH)
        table[tuple(self._places(self.shapes))] = self.shapes[:, -1]
        for dim in range(table.ndim):
            table = table.cummin(dim).values
        self._least_ffn = table

    def _places(self, shapes: Tensor) -> Tensor:
        """(axes - 1, number): on each axis but the FFN's the index of the widest that is no wider; -1 where none is."""
        columns = zip(self._axes[:-1], shapes[:, :-1].T.contiguous(), strict=True)
        return torch.stack([torch.searchsorted(axis, each, right=True) - 1 for axis, each in columns])

    def _within_reach(self, shapes: Tensor) -> Tensor:
        """Per row of (number, axes) widths, whether some feasible shape has no width above them."""
        places = self._places(shapes)
        least = self._least_ffn[tuple(places.clamp(min=0))]
        return (places >= 0).all(0) & (least <= shapes[:, -1])

    def before(self, following: FeasibleShapes) -> None:
        """Keeps only shapes above the target of `following` from which one of its own is within reach. Raises
        ValueError where none is left."""
        leads_on = (self.sizes > following.target) & following._within_reach(self.shapes)
        if not bool(leads_on.any()):
            raise ValueError(
                f"no shape of {amount(self.target)} {self.cost.unit} leads on to {amount(following.target)}; choose "
                "sizes further apart"
            )
        self._keep(self.shapes[leads_on])

    def reachable(self, widths: Widths) -> bool:
        """Whether some feasible shape has no width above these."""
        return bool(self._within_reach(torch.tensor([self.place(widths)])))

    def reached(self, widths: Widths) -> bool:
        """Whether these widths are a feasible shape."""
        return tuple(self.place(widths)) in self._listed

    def shape(self) -> Widths:
        """The final shape, where there is only one (a target given as widths)."""
        (only,) = self.shapes.tolist()
        return self.shape_of(only)

    def balanced(self, within: Widths | None = None) -> Widths:
        """Of the feasible shapes no wider than `within` (default: all) the one whose narrowest width, as a share of the
        source's, is the widest; ties to the larger. What a run will choose is damage's to say."""
        source = self.space.widths
        shares = (self.shapes.double() / torch.tensor(self.place(source))).min(1).values
        inside = (self.shapes <= torch.tensor(self.place(within or source))).all(1)
        return self.shape_of(self.shapes[torch.where(inside, shares, -1.0).argmax()].tolist())

    def least(self, pruning_type: str) -> int:
        """Units of one type in each of its rows in the narrowest shape looked at: its floor, where it may fall."""
        return int(self._axes[self.types.index(pruning_type)][0])

    def may_fall(self, pruning_type: str, widths: Widths) -> bool:
        """Whether the type is above its floor, and one event of it keeps a feasible shape within reach."""
        return widths.count(pruning_type) > self.least(pruning_type) and self.reachable(widths.after(pruning_type))
