"""From a recipe's sizes, alignment and floors to numbers, given the source and the cost."""

from __future__ import annotations

from itertools import pairwise

from efficientllm.config import CostTarget, PruneConfig, WidthTarget
from efficientllm.pruning.costs import TABLE_AXES, Cost, TableCost, place_of, shape_at
from efficientllm.pruning.dimensions import of_type
from efficientllm.pruning.groups import Space
from efficientllm.pruning.landing import Alignment, amount
from efficientllm.pruning.shapes import Floors, proportional_widths, third_of
from efficientllm.pruning.widths import Widths


def target_of(prune: PruneConfig, space: Space, cost: Cost) -> float | Widths:
    """A size in what the cost counts, or widths with those left out taken from the source."""
    target = prune.target
    if isinstance(target, WidthTarget):
        return _widths(target, space.widths)
    return _size(target, space, cost)


def rungs_of(prune: PruneConfig, space: Space, cost: Cost) -> list[float]:
    """The ladder's sizes in what the cost counts. Raises ValueError for one that is out of order."""
    sizes = [_size(size, space, cost) for size in prune.ladder or ()]
    target = target_of(prune, space, cost)
    for larger, smaller in pairwise([*sizes, *([] if not sizes or isinstance(target, Widths) else [target])]):
        if smaller >= larger:
            raise ValueError(
                f"the ladder's sizes must fall towards the target, but {amount(larger)} comes before "
                f"{amount(smaller)}; put the largest first"
            )
    return sizes


def _size(size: float | CostTarget, space: Space, cost: Cost) -> float:
    source: float = cost(space.widths)
    if isinstance(size, CostTarget):
        return size.amount.of(source)
    return round(size * source) if isinstance(size, float) else size


def _widths(target: WidthTarget, source: Widths) -> Widths:
    kv_heads = target.kv_heads or source.kv_heads
    heads = target.heads or kv_heads * source.queries_per_kv
    if target.kv_heads is None and source.queries_per_kv == 1:
        kv_heads = heads
    if heads % kv_heads:
        raise ValueError(f"target heads {heads} is not a multiple of kv_heads {kv_heads}; choose a multiple")
    return Widths(
        target.layers or source.layers,
        target.hidden or source.hidden,
        heads,
        kv_heads,
        target.intermediate or source.intermediate,
    )


def alignment_of(prune: PruneConfig, widths: Widths) -> Alignment:
    if prune.align == "auto":
        return Alignment.automatic(widths)
    return Alignment(prune.align, prune.align)


def floors_of(prune: PruneConfig, space: Space, cost: Cost) -> Floors:
    """The recipe's floors, and where it names none a third of the proportional shape at the (last) target.

    That shape keeps to the floors that are named, and to the source in the widths of types that do not fall. Where
    there is none, or alignment leaves nothing as narrow, a unit is kept: no default puts a target out of reach. Raises
    ValueError for a floor above the source's width.
    """
    lowest, target = named_floors(prune, space, cost), target_of(prune, space, cost)
    if isinstance(target, Widths):
        return lowest
    try:
        shape = proportional_widths(space, target, cost, least=least_of(prune, space, lowest))
    except ValueError:
        return lowest
    asked, align = prune.floors, alignment_of(prune, space.widths)
    third = third_of(shape, align.hidden, align.intermediate)
    floors = Floors(
        layers=lowest.layers,
        hidden=asked.hidden or max(lowest.hidden, third.hidden),
        kv_heads=asked.kv_heads or max(lowest.kv_heads, third.kv_heads),
        queries_per_kv=asked.heads_per_kv or max(lowest.queries_per_kv, third.queries_per_kv),
        intermediate=asked.intermediate or max(lowest.intermediate, third.intermediate),
    )
    narrowest = align.round_up(least_of(prune, space, floors), space.widths)
    return floors if cost(narrowest) <= target else lowest


def named_floors(prune: PruneConfig, space: Space, cost: Cost) -> Floors:
    """The floors that the recipe names, else one unit, or the narrowest width that a table covers."""
    floors, source = prune.floors, space.widths
    bottom = [levels[0] for levels in cost.grid] if isinstance(cost, TableCost) else [1] * len(TABLE_AXES)
    narrowest = shape_at([min(low, have) for low, have in zip(bottom, place_of(source), strict=True)])
    for name, floor, have in (
        ("layers", floors.layers, source.layers),
        ("hidden", floors.hidden, source.hidden),
        ("kv_heads", floors.kv_heads, source.kv_heads),
        ("heads_per_kv", floors.heads_per_kv, source.queries_per_kv),
        ("intermediate", floors.intermediate, source.intermediate),
    ):
        if floor is not None and floor > have:
            raise ValueError(f"prune.floors.{name} {floor} is above the source's {have}; choose at most {have}")
    return Floors(
        layers=floors.layers,
        hidden=floors.hidden or narrowest.hidden,
        kv_heads=floors.kv_heads or narrowest.kv_heads,
        queries_per_kv=floors.heads_per_kv or narrowest.queries_per_kv,
        intermediate=floors.intermediate or narrowest.intermediate,
    )


def least_of(prune: PruneConfig, space: Space, least: Floors) -> Widths:
    """The narrowest shape in which the recipe may look: its target's widths, else these floors."""
    if isinstance(prune.target, WidthTarget):
        return _widths(prune.target, space.widths)
    counts = space.widths.counts()
    return Widths.of(counts | {of_type(name).width: least.of(name) for name in prune.types})
