"""Which entries of which weights belong to units: what falls with a cut, and what stays dead only while it is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS, LAYERS
from efficientllm.pruning.groups import Cut, Slice, Space, labels
from efficientllm.pruning.live import Live


def group_slices(space: Space, events: Sequence[Cut]) -> Iterator[Slice]:
    """Every slice that falls with the cuts, merged to one per weight, dimension and type.

    `space.widths` are the allocated widths, in which the units are counted.
    """
    for dimension in DIMENSIONS.values():
        units = [event.units for event in events if event.type == dimension.type]
        if units:
            fallen = Live.full(space.widths)
            for each in units:
                fallen.remove(Cut(dimension.type, each))
            yield from _dead(space, fallen, dimension.name)


def _dead(space: Space, live: Live, dimension: str) -> Iterator[Slice]:
    """Slices of the units that are dead in a mask in which nothing but units of one dimension has been removed."""
    if dimension == LAYERS:
        layers = set((~live[LAYERS]).nonzero().flatten().tolist())
        for spec in space.params:
            if spec.layer in layers:
                yield Slice(spec.name, 0, torch.arange(space.shape(spec, space.widths)[0]))
        return
    for spec in space.params:
        for dim, axis in enumerate(spec.axes):
            if isinstance(axis, int) or not any(_falls_with(dimension, label) for label in labels(axis)):
                continue
            dead = (~live.entries(axis, spec.layer or 0, space.head_dim)).nonzero()
            rows = dead[:, 0] if spec.is_apart(dim) else None
            if len(dead):
                yield Slice(spec.name, dim, dead[:, -1], rows)


def _falls_with(dimension: str, label: str) -> bool:
    """Whether entries of a label fall with units of a dimension. What is apart lies in a weight whose dimension 0 says
    that already, but for its own units."""
    return label == dimension if DIMENSIONS[label].apart else dimension in DIMENSIONS[label].chain


def dead_slices(space: Space, live: Live) -> Iterator[Slice]:
    """What a gradient reaches although it is dead: query heads whose KV head is live, biases of dead layers."""
    for dimension in DIMENSIONS.values():
        if dimension.held:
            only = Live.full(space.widths)
            dead = ~_own(live, dimension.name) & _outer_live(live, dimension.name)
            for units in _columns(dead):
                only.remove(Cut(dimension.type, units))
            yield from _dead(space, only, dimension.name)


def _own(live: Live, dimension: str) -> Tensor:
    """Live units of a dimension, bool (rows, units)."""
    return live.units(DIMENSIONS[dimension].type)


def _outer_live(live: Live, dimension: str) -> Tensor:
    """Whether the unit that each row lies within is live, bool (rows, 1)."""
    within = DIMENSIONS[dimension].within
    return live[within].flatten()[:, None] if within else torch.ones(1, 1, dtype=torch.bool)


def _columns(dead: Tensor) -> Iterator[Tensor]:
    """Units to remove, int64 (rows,), -1 where a row has none, from bool (rows, units)."""
    for unit in range(dead.shape[1]):
        if bool(dead[:, unit].any()):
            yield torch.where(dead[:, unit], unit, -1)
