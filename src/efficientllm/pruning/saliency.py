"""Saliency: a criterion's scores, summed to one number a unit, and averaged over looks.

Each weight is reduced along its axes first, so that one pass over the weights serves all pruning types.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from efficientllm.pruning.criteria import Criterion
from efficientllm.pruning.dimensions import DIMENSIONS, LAYERS
from efficientllm.pruning.groups import ParamSpec, Space, labels
from efficientllm.pruning.live import mask_shapes
from efficientllm.pruning.shards import ALONE, World, first_row, local


class AxisSums:
    """Element scores summed over all but one axis: hidden (D,), ffn (L, F), kv (L, K*hd), query (L, H*hd),
    expert (L, E), expert_ffn (L, E, F); depth (L,).

    fp32, on the weights' device. Sums over weights are linear, so that partial sums of shards add up.
    """

    def __init__(self, space: Space, device: torch.device) -> None:
        self.space = space
        self.sums: dict[str, Tensor] = {LAYERS: torch.zeros(space.widths.layers, device=device)}
        for axis, shape in mask_shapes(space.widths):
            if axis != LAYERS:
                length = space.axis_length(axis, space.widths)
                rows = shape[:-1] if DIMENSIONS[axis].apart else shape[: len(shape) > 1]
                self.sums[axis] = torch.zeros((*rows, length), device=device)

    def add(self, spec: ParamSpec, scores: Tensor, first: int = 0) -> None:
        """Adds one weight's element scores: its shape, or some of its rows, from row `first` on."""
        if spec.layer is not None:
            self.sums[LAYERS][spec.layer] += scores.sum()
        for dim, axis in enumerate(spec.axes):
            apart = spec.is_apart(dim)
            # What falls with an expert is counted by the channels of it, as those of a head are.
            if isinstance(axis, int) or (dim == 0 and any(map(spec.is_apart, range(scores.ndim)))):
                continue
            others = [other for other in range(scores.ndim) if other != dim and not (apart and other == 0)]
            vector = scores.sum(others) if others else scores
            if apart:
                self._add_apart(spec, dim, vector, first)
                continue
            start = first if dim == 0 else 0  # of what is here, from the beginning of each label's stretch
            for label in labels(axis):
                target = self._of(label, spec)
                low, high = (min(max(place, 0), len(target)) for place in (start, start + len(vector)))
                target[low:high].add_(vector[low - start : high - start] if high > low else 0.0)
                start -= len(target)

    def _add_apart(self, spec: ParamSpec, dim: int, table: Tensor, first: int) -> None:
        """table: (experts from the first-th on, entries along a dimension that is apart)."""
        names = labels(spec.axes[dim])
        for label, part in zip(names, table.chunk(len(names), dim=1), strict=True):
            self._of(label, spec)[first : first + len(part)] += part

    def reduce(self, reduction: World) -> None:
        """Adds what the processes with other rows of the weights have: all axes as one packed vector."""
        if reduction.world == 1:
            return
        packed = reduction.over_shards(torch.cat([total.flatten() for total in self.sums.values()]))
        parts = packed.split([total.numel() for total in self.sums.values()])
        self.sums = {axis: part.view(total.shape) for (axis, total), part in zip(self.sums.items(), parts, strict=True)}

    def add_columns(self, spec: ParamSpec, scores: Tensor) -> None:
        """Adds the scores of one linear layer's inputs, (inputs,), of all experts (experts, inputs). A layer's own are
        those of its heads and FFN."""
        axis = str(spec.inputs)
        if spec.layer is not None and DIMENSIONS[axis].within:
            self.sums[LAYERS][spec.layer] += scores.sum()
        self._of(axis, spec).add_(scores)

    def _of(self, axis: str, spec: ParamSpec) -> Tensor:
        """The sums along an axis that a weight adds to: its layer's, or the model's."""
        return self.sums[axis][spec.layer or 0] if DIMENSIONS[axis].within else self.sums[axis]

    def units(self) -> dict[str, Tensor]:
        """Scores per unit of every pruning type, fp32 (rows, units): of all axes that the unit has entries along."""
        shapes, scores = dict(mask_shapes(self.space.widths)), {}
        for name, shape in shapes.items():
            parts = [self.sums[name]] if name == LAYERS else list(self._parts(name, shapes))
            total = sum(parts[1:], start=parts[0])
            scores[DIMENSIONS[name].type] = total.flatten(0, -2) if len(shape) > 1 else total[None]
        return scores

    def _parts(self, dimension: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
        """Sums along each axis that runs over the dimension's units, in the dimension's own shape."""
        for axis, shape in shapes.items():
            if axis != LAYERS and dimension in DIMENSIONS[axis].chain:
                table = self.sums[axis].view(*shape, -1) if DIMENSIONS[axis].per_head else self.sums[axis].view(shape)
                while table.ndim > len(shapes[dimension]):
                    table = table.sum(-1)
                yield table


def unit_scores(
    space: Space,
    chosen: Criterion,
    weights: Iterable[tuple[ParamSpec, Tensor, Tensor]],
    device: torch.device,
    reduction: World = ALONE,
) -> dict[str, Tensor]:
    """Saliency of every unit of every type by an element criterion, fp32 (rows, units), from (spec, w, g).

    Of a norm w is the gain, which some families keep as 1 + w. Of sharded weights each process scores the rows it
    holds; the sums along the axes are then added up.
    """
    assert chosen.element is not None
    sums = AxisSums(space, device)
    for spec, weight, grad in weights:
        own, offset = local(weight), space.offsets.get(spec.name, 0.0)
        scores = chosen.element(own + offset if offset else own, local(grad))
        sums.add(spec, scores.float(), first_row(weight))
    sums.reduce(reduction)
    units = sums.units()
    return {name: score.abs() for name, score in units.items()} if chosen.signed else units


def drawn_scores(space: Space, seed: int) -> dict[str, Tensor]:
    """A uniform draw for every unit, fp32 (rows, units) on the CPU; a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    units = AxisSums(space, torch.device("cpu")).units()
    return {name: torch.rand(score.shape, generator=generator) for name, score in units.items()}


class MovingAverage:
    """Exponential moving average of looks at every type, each divided by its own sum first: |g w| of a mean over more
    tokens is smaller, and so looks of unequal size would weigh unequally.

    sums: shares of the looks' sums, by type (rows, units), and scale: the sums themselves, both weighted and added up;
    weight: of all looks together. All by type, since types may be looked at by different criteria at different times.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.scale: dict[str, float] = {}
        self.weight: dict[str, float] = {}

    def update(self, scores: Mapping[str, Tensor], keep: float) -> None:
        """keep: share of its weight that each earlier look at these types keeps."""
        for name, score in scores.items():
            total = float(score.cpu().sum(dtype=torch.float64))  # some devices have no fp64
            old, share = self.sums.get(name), score / (total or 1.0)
            self.sums[name] = share if old is None else old.mul_(keep).add_(share)
            self.weight[name] = keep * self.weight.get(name, 0.0) + 1.0
            self.scale[name] = keep * self.scale.get(name, 0.0) + total

    def values(self) -> dict[str, Tensor]:
        """The averages in the criterion's own unit, on the CPU; an empty dict before the first update."""
        worth = {name: self.scale[name] / self.weight[name] for name in self.sums}  # of a share of 1: the average sum
        return {name: (total * (worth[name] / self.weight[name])).cpu() for name, total in self.sums.items()}
