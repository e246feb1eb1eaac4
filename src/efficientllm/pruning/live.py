"""Which units of a model are still there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS, of_type
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.widths import Widths


class Live(dict[str, Tensor]):
    """Which units of a model are still there: bool tensors on the CPU, one of each dimension, by its name.

    Its mask is indexed by all the dimensions that it lies within: hidden (D,), layers (L,), ffn (L, F), kv (L, K),
    query (L, K, Q). A unit within a dead one is dead too: a query head of a dead KV head, everything in a dead layer.
    """

    @classmethod
    def full(cls, widths: Widths) -> Live:
        return cls({name: torch.ones(shape, dtype=torch.bool) for name, shape in mask_shapes(widths)})

    @classmethod
    def saved(cls, masks: Mapping[str, Tensor], widths: Widths) -> Live:
        """Copies of saved masks. Raises ValueError where they are not those of a model of these widths."""
        found, own = {name: tuple(mask.shape) for name, mask in masks.items()}, dict(mask_shapes(widths))
        for name in sorted(found.keys() | own.keys()):
            if found.get(name) != own.get(name):
                raise ValueError(
                    f"the mask of '{name}' is {found.get(name, 'missing')}, where its model has "
                    f"{own.get(name, 'none')}; go on with the version that saved it"
                )
        return cls({name: mask.to("cpu", torch.bool, copy=True) for name, mask in masks.items()})

    def clone(self) -> Live:
        return Live({name: mask.clone() for name, mask in self.items()})

    def widths(self) -> Widths:
        """Widths of what is live; uniform over layers by construction."""
        counts = {}
        for name, mask in self.items():
            rows = mask.flatten(0, -2) if mask.ndim > 1 else mask[None]
            counts[DIMENSIONS[name].width] = int(rows.sum(1).max())
        return Widths.of(counts)

    def units(self, pruning_type: str) -> Tensor:
        """Live units of one type, bool (rows, units)."""
        mask = self[of_type(pruning_type).name]
        return mask.flatten(0, -2) if mask.ndim > 1 else mask[None]

    def entries(self, axis: str | tuple[str, ...], layer: int, head_dim: int) -> Tensor:
        """Live entries along one axis of one layer, bool (length,); of one that is apart (experts, length)."""
        if isinstance(axis, tuple):
            return torch.cat([self.entries(part, layer, head_dim) for part in axis], dim=-1)
        dimension = DIMENSIONS[axis]
        mask = self[axis]
        if dimension.apart:
            return mask[layer]
        units = (mask[layer] if dimension.within else mask).flatten()
        return units.repeat_interleave(head_dim) if dimension.per_head else units

    def remove(self, event: Removal) -> None:
        """Marks the units of a removal as dead. Raises ValueError if one of them was dead before."""
        units = self.units(event.type)
        rows = (event.units >= 0).nonzero().flatten()
        taken = event.units[rows]
        if not units[rows, taken].all():
            raise ValueError(f"{event.type} event takes a unit that is dead already")
        units[rows, taken] = False
        name = of_type(event.type).name
        for inner, mask in self.items():
            if name in DIMENSIONS[inner].outer:
                own = self[name]
                mask &= own.view(own.shape + (1,) * (mask.ndim - own.ndim))


def mask_shapes(widths: Widths) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dimension, shape of its masks, scores and kept units) of every dimension that a model of these widths has."""
    counts = widths.counts()
    for name, dimension in DIMENSIONS.items():
        if dimension.width in counts:
            yield name, tuple(counts[DIMENSIONS[each].width] for each in dimension.chain)


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with a prefix (contract.PREFIXES), by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
