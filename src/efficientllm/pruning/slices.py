"""Which entries of which weights belong to units: what falls with a cut, and what stays dead only while it is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from efficientllm.pruning.groups import (
    ATTENTION,
    ATTENTION_QUERY,
    DEPTH,
    FFN,
    FFN_TYPE,
    HIDDEN,
    KV,
    PRUNING_TYPES,
    QUERY,
    STEM,
    Cut,
    Live,
    Slice,
    Space,
    unknown,
)


def entries(axis: str, rows: Tensor, units: Tensor, pruning_type: str, shape: tuple[int, int, int]) -> Tensor:
    """Entries along `axis` of one layer (or of the model) that belong to the given units.

    rows, units: int64 (n,), all of one layer. shape: (kv_heads, queries_per_kv, head_dim) as allocated.
    Returns int64, sorted.
    """
    kv_heads, queries, head_dim = shape
    if pruning_type in (FFN_TYPE, STEM):
        return units.sort().values
    if pruning_type == ATTENTION_QUERY:
        heads = (rows % kv_heads) * queries + units
    elif pruning_type != ATTENTION:
        raise unknown(pruning_type)
    elif axis == KV:
        heads = units
    else:
        heads = (units[:, None] * queries + torch.arange(queries)).flatten()
    return (heads.sort().values[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _layer_slices(space: Space, layers: set[int]) -> Iterator[Slice]:
    """Every weight of the given layers, whole."""
    for spec in space.params:
        if spec.layer in layers:
            yield Slice(spec.name, 0, torch.arange(space.shape(spec, space.widths)[0]))


CUT_AXES = {ATTENTION: (QUERY, KV), ATTENTION_QUERY: (QUERY,), FFN_TYPE: (FFN,), STEM: (HIDDEN,)}


def group_slices(space: Space, events: Sequence[Cut]) -> Iterator[Slice]:
    """Every slice that falls with the cuts, merged to one per weight, dimension and type.

    `space.widths` are the allocated widths, in which the units are counted.
    """
    widths = space.widths
    shape = (widths.kv_heads, widths.queries_per_kv, space.head_dim)
    for pruning_type in PRUNING_TYPES:
        units = [event.units for event in events if event.type == pruning_type]
        if not units:
            continue
        table = torch.stack(units)  # (events, rows)
        if pruning_type == DEPTH:
            yield from _layer_slices(space, set(table.flatten().tolist()))
            continue
        rows_per_layer = table.shape[1] if pruning_type == STEM else table.shape[1] // widths.layers
        for spec in space.params:
            for dim, axis in enumerate(spec.axes):
                if axis not in CUT_AXES[pruning_type]:
                    continue
                first = 0 if pruning_type == STEM else (spec.layer or 0) * rows_per_layer
                rows = torch.arange(first, first + rows_per_layer).expand(len(units), -1)
                taken = table[:, first : first + rows_per_layer]
                there = taken >= 0
                indices = entries(str(axis), rows[there], taken[there], pruning_type, shape)
                if len(indices):
                    yield Slice(spec.name, dim, indices)


def dead_slices(space: Space, live: Live) -> Iterator[Slice]:
    """What a gradient reaches although it is dead: query heads whose KV head is live, biases of dead layers."""
    dead = (~live.query & live.kv[:, :, None]).flatten(0, 1)  # none in a dead layer
    cuts = []
    for unit in range(dead.shape[1]):
        units = torch.where(dead[:, unit], unit, -1)
        if bool((units >= 0).any()):
            cuts.append(Cut(ATTENTION_QUERY, units))
    cuts += [Cut(DEPTH, layer[None]) for layer in (~live.layers).nonzero().flatten()]
    return group_slices(space, cuts)
