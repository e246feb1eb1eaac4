"""From a recipe's sizes, alignment and floors to numbers, given the source and the cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from itertools import pairwise

from efficientllm.config import CostTarget, PruneConfig, WidthTarget
from efficientllm.config.prune import FloorsConfig
from efficientllm.models.experts import EXPERT_STEP
from efficientllm.pruning.costs import TABLE_AXES, Cost, TableCost
from efficientllm.pruning.dimensions import DEFAULT_TYPES, EXPERT_TYPES, of_type
from efficientllm.pruning.feasible import amount
from efficientllm.pruning.groups import Space
from efficientllm.pruning.shapes import Alignment, Floors, proportional_widths, third_of
from efficientllm.pruning.widths import Widths


def target_of(prune: PruneConfig, space: Space, cost: Cost) -> float | Widths:
    """A size in what the cost counts, or widths with those left out taken from the source."""
    target = prune.target
    if isinstance(target, WidthTarget):
        return _widths(target, space.widths)
    return _size(target, space, cost)


def milestones_of(prune: PruneConfig, space: Space, cost: Cost) -> list[float]:
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


# Keys of a recipe that have another name than the width; `intermediate` is of experts where there are some.
_KEYS = {"queries_per_kv": "heads_per_kv", "expert_intermediate": "intermediate"}


def _by_width(section: WidthTarget | FloorsConfig, source: Widths) -> dict[str, int]:
    """What a section gives, by the names of the source's widths."""
    widths = {_KEYS.get(width, width): width for width in source.counts()}
    given = {key: getattr(section, key) for key in type(section).model_fields}
    return {widths.get(key, key): value for key, value in given.items() if value}


def types_asked(prune: PruneConfig, space: Space) -> tuple[str, ...]:
    """The types that may fall, tokens apart. The default is whatever of the source can; named types are taken at their
    word.

    Raises ValueError for one that this source does not have, or that cannot fall.
    """
    if prune.units == DEFAULT_TYPES:
        return tuple(name for name in space.types if of_type(name).default)
    for name in prune.units:
        if name in space.fixed:
            raise ValueError(f"prune.types has {name}, which cannot fall here: {space.fixed[name]}; leave it out")
        if name not in space.types:
            kind, other = (
                ("no experts", "ffn") if name in EXPERT_TYPES else ("no FFN but those of experts", "expert_ffn")
            )
            raise ValueError(f"prune.types has {name}, but the source has {kind}: write {other} in its place")
    return prune.units


def _widths(target: WidthTarget, source: Widths) -> Widths:
    kv_heads = target.kv_heads or source.kv_heads
    heads = target.heads or kv_heads * source.queries_per_kv
    if target.kv_heads is None and source.queries_per_kv == 1:
        kv_heads = heads
    if heads % kv_heads:
        raise ValueError(f"target heads {heads} is not a multiple of kv_heads {kv_heads}; choose a multiple")
    asked = _by_width(target, source)
    for name in asked:
        if name not in source.record():
            raise ValueError(f"prune.target has {name}, a width that the source does not have; leave it out")
    return source.changed(**(asked | {"heads": heads, "kv_heads": kv_heads}))


def alignment_of(prune: PruneConfig, widths: Widths) -> Alignment:
    if prune.align == "auto":
        return Alignment.automatic(widths, EXPERT_STEP if "experts" in widths.counts() else 1)
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
    asked, align = _asked(prune, space.widths), alignment_of(prune, space.widths)
    third = asdict(third_of(shape, align.hidden, align.intermediate)) | {"layers": lowest.layers}
    floors = Floors(**{name: asked.get(name) or max(low, third[name]) for name, low in asdict(lowest).items()})
    narrowest = align.round_up(least_of(prune, space, floors), space.widths)
    return floors if cost(narrowest) <= target else lowest


def section_of(floors: Floors, source: Widths) -> FloorsConfig:
    """Floors as a recipe names them, of the widths that the source has."""
    return FloorsConfig(**{_KEYS.get(width, width): getattr(floors, width) for width in source.counts()})


def idle_floors(prune: PruneConfig, space: Space, falling: Collection[str]) -> list[str]:
    """Floors that the recipe names, more than every source keeps, of widths that none of the falling types narrows."""
    of_width = {of_type(name).width: name for name in space.widths.types()}
    named = {width: of_width[width] for width, floor in _asked(prune, space.widths).items() if floor > 1}
    return [f"prune.floors.{_KEYS.get(width, width)}" for width, name in named.items() if name not in falling]


def _asked(prune: PruneConfig, source: Widths) -> dict[str, int]:
    """The floors that the recipe names, by the names of widths."""
    return _by_width(prune.floors, source)


def named_floors(prune: PruneConfig, space: Space, cost: Cost) -> Floors:
    """The floors that the recipe names, else one unit (of experts those that a token uses), or the narrowest width that
    a table covers."""
    source = space.widths.counts()
    low = {of_type(name).width: space.least(name) for name in space.widths.types()}
    if isinstance(cost, TableCost):
        low = {axis: min(levels[0], source[axis]) for axis, levels in zip(TABLE_AXES, cost.grid, strict=True)}
    for width, floor in _asked(prune, space.widths).items():
        name = f"prune.floors.{_KEYS.get(width, width)}"
        if width not in source:
            raise ValueError(f"{name} is the floor of a width that the source does not have; leave it out")
        if floor > source[width]:
            raise ValueError(f"{name} {floor} is above the source's {source[width]}; choose at most {source[width]}")
        if width == "experts" and floor < space.experts_per_token:
            raise ValueError(
                f"{name} {floor} is below the {space.experts_per_token} experts that every token uses "
                f"(num_experts_per_tok); choose at least {space.experts_per_token}"
            )
    return Floors(**(low | _asked(prune, space.widths)))


def least_of(prune: PruneConfig, space: Space, least: Floors) -> Widths:
    """The narrowest shape in which the recipe may look: its target's widths, else these floors."""
    if isinstance(prune.target, WidthTarget):
        return _widths(prune.target, space.widths)
    counts = space.widths.counts()
    return Widths.of(counts | {of_type(name).width: least.of(name) for name in types_asked(prune, space)})
