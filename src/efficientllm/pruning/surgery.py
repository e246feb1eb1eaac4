"""Compaction: cutting {name: tensor} down to narrower widths. Pure; the same code serves memory and disk.

Cutting the stem from D to d channels changes the mean inside RMSNorm from sum/D to sum/d. With the gains times
sqrt(D/d) and epsilon times D/d the function is unchanged (docs/method.md). What else a changed width changes is undone
alike (Space.scaling). A weight scaled by a has its Adam moments scaled by 1/a and 1/a^2, as its gradient is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS, LAYERS, of_type
from efficientllm.pruning.groups import ParamSpec, Space
from efficientllm.pruning.live import Live, mask_shapes
from efficientllm.pruning.shards import ALONE, World, is_sharded, laid_out_like, whole
from efficientllm.pruning.widths import Widths

MOMENT_POWER = {"exp_avg": -1.0, "exp_avg_sq": -2.0, "max_exp_avg_sq": -2.0, "momentum_buffer": -1.0}


@dataclass(frozen=True)
class Kept:
    """Units that stay. units: int64, sorted along the last dimension, of every dimension (..., kept): one row for each
    unit that stays of the dimensions that it lies within, numbered within that row as before the cut. live: which of
    them are live; the others pad."""

    units: Mapping[str, Tensor]
    live: Live

    def entries(self, axis: str | tuple[str, ...], layer: int, space: Space) -> Tensor:
        """Entries along one axis of a space that stay, int64; of one that is apart (experts that stay, entries). layer:
        place among the layers that stay."""
        if isinstance(axis, tuple):
            lengths = [0, *(space.axis_length(part, space.widths) for part in axis)]
            firsts = itertools.accumulate(lengths[:-1])
            parts = [self.entries(part, layer, space) + first for part, first in zip(axis, firsts, strict=True)]
            return torch.cat(parts, dim=-1)
        if DIMENSIONS[axis].apart:
            return self.units[axis][layer]
        dimension, before, head_dim = DIMENSIONS[axis], space.widths, space.head_dim
        entries = torch.zeros(1, dtype=torch.long)
        for name in dimension.chain:
            if name != LAYERS:
                own = self.units[name]
                units = (own[layer] if DIMENSIONS[name].within else own).view(len(entries), -1)
                entries = (entries[:, None] * before[DIMENSIONS[name].width] + units).flatten()
        return (entries[:, None] * head_dim + torch.arange(head_dim)).flatten() if dimension.per_head else entries

    def factor(self, spec: ParamSpec, space: Space) -> float:
        """What a weight is multiplied by when a space is cut to these units."""
        widths = Widths.of({DIMENSIONS[name].width: units.shape[-1] for name, units in self.units.items()})
        ratios = (
            (space.axis_length(axis, space.widths) / space.axis_length(axis, widths)) ** power
            for axis, power in space.scaling.get(spec.name, ())
        )
        return math.sqrt(math.prod(ratios))


def _gather(kept: Mapping[str, Tensor], table: Tensor, chain: Sequence[str]) -> Tensor:
    """What stays of a tensor that is indexed by the units of these dimensions, each within the one before it."""
    for place, name in enumerate(chain):
        units = kept[name].to(table.device)
        units = units.view(units.shape + (1,) * (table.ndim - place - 1))
        table = table.gather(place, units.expand(*units.shape[: place + 1], *table.shape[place + 1 :]))
    return table


def _first(live: Tensor, count: int) -> Tensor:
    """Per row (last dimension) `count` indices: all live ones, then the lowest dead ones as padding; sorted."""
    order = (~live).to(torch.uint8).sort(dim=-1, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def choose_kept(live: Live, widths: Widths) -> Kept:
    """Units that stay when the model is cut to `widths`, which may exceed the live ones (alignment)."""
    units: dict[str, Tensor] = {}
    for name, mask in sorted(live.items(), key=lambda each: len(DIMENSIONS[each[0]].chain)):
        rows = _gather(units, mask, DIMENSIONS[name].outer)
        units[name] = _first(rows, widths[DIMENSIONS[name].width])
    left = {name: _gather(units, mask, DIMENSIONS[name].chain) for name, mask in live.items()}
    return Kept(units, Live(left))


def cut_live(live: Live, kept: Kept) -> Live:
    """The live mask in the new widths; padding stays dead."""
    return Live({name: _gather(kept.units, mask, DIMENSIONS[name].chain) for name, mask in live.items()})


def cut_weight(tensor: Tensor, spec: ParamSpec, layer: int, kept: Kept, space: Space, power: float = 1.0) -> Tensor:
    """One weight, or one of its moments, at the new widths; a new contiguous tensor on the same device.

    layer: place of its layer among those that stay. power: of the weight's factor that it is multiplied by. A sharded
    weight is gathered, cut and laid out anew as it was: the one place where a whole weight stands on a process, one at
    a time.
    """
    pattern, tensor = tensor, whole(tensor)
    for dim, axis in enumerate(spec.axes):
        if not isinstance(axis, int):
            entries = kept.entries(axis, layer, space).to(tensor.device)
            if entries.shape[-1] == tensor.shape[dim]:
                continue
            if spec.is_apart(dim):  # dimension 0 has been cut before
                places = entries.view(len(entries), *(-1 if each == dim else 1 for each in range(1, tensor.ndim)))
                tensor = tensor.take_along_dim(places, dim)
            else:
                tensor = tensor.index_select(dim, entries)
    factor = kept.factor(spec, space)
    if factor != 1.0:
        offset = space.offsets.get(spec.name, 0.0) if power == 1.0 else 0.0
        tensor = tensor * factor**power
        if offset:  # the gain is offset + weight; the weights of dead units stay at 0, where nothing moves them
            axis = spec.axes[0]
            assert not isinstance(axis, int)
            tensor += offset * (factor - 1.0)
            tensor *= kept.live.entries(axis, layer, space.head_dim).to(tensor)
    if is_sharded(pattern):
        return laid_out_like(tensor.contiguous(), pattern)
    return tensor.clone(memory_format=torch.contiguous_format)


def cut_rows(tensor: Tensor, kept: Tensor) -> Tensor:
    """These rows (int64, in rising order) of a weight, or of one of its moments, in a new tensor laid out as it was."""
    rows = whole(tensor).index_select(0, kept.to(tensor.device))
    return laid_out_like(rows, tensor) if is_sharded(tensor) else rows


def names_after(space: Space, kept: Kept) -> dict[str, str]:
    """New name of every weight that stays, by its old one: layers are counted anew."""
    places = {layer: place for place, layer in enumerate(kept.units[LAYERS].tolist())}
    return {
        spec.name: spec.name if spec.layer is None else spec.name_in(places[spec.layer])
        for spec in space.params
        if spec.layer is None or spec.layer in places
    }


def cut_state(
    space: Space,
    kept: Kept,
    weights: dict[str, Tensor],
    moments: dict[str, dict[str, Tensor]],
    *,
    consume: bool = False,
    ranks: World = ALONE,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """All weights {name: tensor} and optimizer moments {name: {key: tensor}} at the new widths, in new tensors.

    With `consume` the given dictionaries are emptied on the way, a weight at a time. ranks: told after each weight that
    this process has come further.
    Raises ValueError for optimizer state other than that of Adam, AdamW and SGD.
    """
    if not consume:
        weights, moments = dict(weights), dict(moments)
    unknown = {
        key for each in moments.values() for key, value in each.items() if not torch.is_tensor(value) or value.ndim
    } - MOMENT_POWER.keys()
    if unknown:
        raise ValueError(f"optimizer state '{min(unknown)}' cannot be compacted; use Adam, AdamW or SGD")
    cut_weights: dict[str, Tensor] = {}
    cut_moments: dict[str, dict[str, Tensor]] = {}
    places = {layer: place for place, layer in enumerate(kept.units[LAYERS].tolist())}
    for spec in space.params:
        if spec.layer is not None and spec.layer not in places:
            weights.pop(spec.name)
            moments.pop(spec.name, None)
            continue
        ranks.beat()
        layer = 0 if spec.layer is None else places[spec.layer]
        name = spec.name if spec.layer is None else spec.name_in(layer)
        cut_weights[name] = cut_weight(weights.pop(spec.name), spec, layer, kept, space)
        cut_moments[name] = {}
        for key, moment in moments.pop(spec.name, {}).items():
            if moment.ndim == 0:  # AdamW's step count
                cut_moments[name][key] = moment.clone()
                continue
            cut_moments[name][key] = cut_weight(moment, spec, layer, kept, space, MOMENT_POWER[key])
    return cut_weights, cut_moments


def cut_scores(scores: Mapping[str, Tensor], kept: Kept, before: Widths) -> dict[str, Tensor]:
    """Saliency averages (rows, units) of every pruning type at the new widths."""
    shapes, cut = dict(mask_shapes(before)), {}
    for name, score in scores.items():
        dimension = of_type(name)
        left = _gather(kept.units, score.view(shapes[dimension.name]), dimension.chain)
        cut[name] = left.flatten(0, -2) if left.ndim > 1 else left[None]
    return cut
