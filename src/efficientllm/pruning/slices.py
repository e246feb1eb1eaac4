"""Which entries of which weights belong to units: what falls with a cut, and what stays dead only while it is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from efficientllm.pruning.dimensions import DIMENSIONS, LAYERS
from efficientllm.pruning.groups import Removal, Slice, Space, labels
from efficientllm.pruning.live import Live


def group_slices(space: Space, events: Sequence[Removal]) -> Iterator[Slice]:
    """Every slice that falls with the cuts, merged to one per weight, dimension and type.

    `space.widths` are the allocated widths, in which the units are counted.
    """
    for dimension in DIMENSIONS.values():
        own = [event for event in events if event.type == dimension.type]
        if own:
            fallen = Live.full(space.widths)
            for each in own:
                fallen.remove(each)
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
            within = dimension.within
            outer = live[within].flatten()[:, None] if within else torch.ones(1, 1, dtype=torch.bool)
            dead, only = ~live.units(dimension.type) & outer, Live.full(space.widths)  # bool (rows, units)
            for unit in dead.any(0).nonzero().flatten().tolist():
                only.remove(Removal(dimension.type, torch.where(dead[:, unit], unit, -1)))
            yield from _dead(space, only, dimension.name)
