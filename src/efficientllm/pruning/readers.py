"""Which linear layers read what, and which lose inputs to a cut; saliency by criteria that look at what they read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from efficientllm.pruning.criteria import Criterion
from efficientllm.pruning.dimensions import DIMENSIONS, EXPERT, LAYERS
from efficientllm.pruning.groups import Axis, ParamSpec, Removal, Space, labels
from efficientllm.pruning.live import Live
from efficientllm.pruning.saliency import AxisSums
from efficientllm.pruning.shards import ALONE, World, first_row, local
from efficientllm.pruning.slices import group_slices


def reader_specs(space: Space) -> list[ParamSpec]:
    """Linear layers that read an axis: every matrix whose inputs have a label, those of experts as one, but for the
    embedding."""
    return [
        spec
        for spec in space.params
        if len(spec.axes) > 1 and isinstance(spec.inputs, str) and spec.name not in space.embeddings
    ]


def read_tensors(space: Space) -> dict[tuple[str, str, bool], list[tuple[Axis, ...]]]:
    """Output axes of the linear layers that read one tensor, by (its axis, the dimension that their outputs
    lie within, whether in every layer): q, k and v of a layer share one, gate and up another, a router and its experts
    too; what the last matrices of experts read is each one's own."""
    sites: dict[tuple[str, str, bool], list[tuple[Axis, ...]]] = defaultdict(list)
    for spec in reader_specs(space):
        if not spec.layer:
            outputs = spec.axes[spec.is_apart(-1) : -1]
            chain = DIMENSIONS[labels(outputs[0])[0]].chain if labels(outputs[0]) else ()
            outermost = next((each for each in chain if each != LAYERS), "")
            sites[str(spec.inputs), outermost, spec.layer is not None].append(outputs)
    return sites


def inputs_of_expert(name: str, expert: int) -> str:
    """What the inputs of one expert are called, whose weight is a part of the weight of this name."""
    return f"{name}.{expert}"


@dataclass(frozen=True)
class Reader:
    """A linear layer that loses inputs: its weight's name; removed, int64 (|P|,), and kept, bool (inputs,):
    what lives on. expert: the one whose part of the weight it is."""

    name: str
    removed: Tensor
    kept: Tensor
    expert: int | None = None

    @property
    def source(self) -> str:
        """What its inputs are called."""
        return self.name if self.expert is None else inputs_of_expert(self.name, self.expert)

    def weight(self, params: Mapping[str, Tensor]) -> Tensor:
        """The part of its weight that lies here: rows of it, of an expert all or none."""
        weight = local(params[self.name])
        if self.expert is None:
            return weight
        place = self.expert - first_row(params[self.name])
        return weight[place] if 0 <= place < len(weight) else weight[0, :0]


def losing_readers(space: Space, events: Sequence[Removal], live: Live) -> Iterator[Reader]:
    """Every linear layer that loses inputs to the events. `live` is the mask without them.

    FFN channels: down_proj, of experts each one's own. Heads and KV groups: o_proj. Stem: q, k, v, gate, up of every
    layer, the router, and the LM head.
    A tied LM head is left out: its matrix is the embedding too, and correcting it as a reader would change what every
    token writes into the stem.
    """
    specs = {spec.name: spec for spec in reader_specs(space)}
    for part in group_slices(space, events):
        if part.name in specs and part.dim == len(specs[part.name].axes) - 1:
            spec = specs[part.name]
            kept = live.entries(str(spec.inputs), spec.layer or 0, space.head_dim)
            if part.rows is None:
                yield Reader(part.name, part.indices, kept)
                continue
            for expert in part.rows.unique().tolist():
                yield Reader(part.name, part.indices[part.rows == expert], kept[expert], expert)


def input_scores(
    space: Space,
    chosen: Criterion,
    readers: Sequence[ParamSpec],
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    device: torch.device,
    reduction: World = ALONE,
) -> dict[str, Tensor]:
    """Saliency by a criterion that needs inputs, as `unit_scores`. inputs: X of each reader, (tokens, inputs), and of
    each expert by `inputs_of_expert`, of the tokens that have chosen it."""
    assert chosen.statistic is not None
    sums = AxisSums(space, device)
    statistics: dict[int, Tensor] = {}
    outputs = torch.zeros_like(sums.sums[EXPERT]) if chosen.expert else None
    tokens = 0
    for spec in readers:
        if spec.is_apart(-1):
            found = _expert_columns(spec, chosen, params[spec.name], inputs, tokens, reduction)
            sums.add_columns(spec, found.columns.to(device))
            if outputs is not None:
                outputs[spec.layer or 0] = found.outputs
            continue
        if chosen.routed:
            continue
        shared = inputs[spec.name]
        known = id(shared) in statistics
        if not known:
            whole = reduction.all_tokens(shared)
            tokens, statistics[id(shared)] = len(whole), chosen.statistic(whole.float())
        if chosen.column:
            weight = local(params[spec.name]).flatten(0, -2)  # the rows of all experts read one X
            sums.add_columns(spec, chosen.column(weight.float(), statistics[id(shared)]))
        elif not known:
            sums.add_columns(spec, statistics[id(shared)])
    if chosen.column:  # over the rows that each process holds; a statistic alone is whole everywhere
        sums.reduce(reduction)
    scores = sums.units()
    if outputs is not None:
        scores[EXPERT] = reduction.over_shards(outputs)
    return {name: score.sqrt() for name, score in scores.items()} if chosen.root else scores


@dataclass
class _Experts:
    """Of one layer's experts: scores of their inputs (experts, inputs), and of each as a whole (experts,)."""

    columns: Tensor
    outputs: Tensor


def _expert_columns(
    spec: ParamSpec, chosen: Criterion, weight: Tensor, inputs: Mapping[str, Tensor], tokens: int, reduction: World
) -> _Experts:
    """tokens: of all processes. An expert that a token has not chosen reads zeros of it, unless the criterion looks at
    those alone that have."""
    assert chosen.statistic is not None
    matrices, first = local(weight).float(), first_row(weight)
    found = _Experts(
        matrices.new_zeros(weight.shape[0], weight.shape[-1]),
        matrices.new_zeros(weight.shape[0]),
    )
    for expert in range(weight.shape[0]):
        own = reduction.all_tokens(inputs[inputs_of_expert(spec.name, expert)]).float()
        if not chosen.routed:
            own = functional.pad(own, (0, 0, 0, tokens - len(own)))
        statistic, here = chosen.statistic(own), 0 <= expert - first < len(matrices)
        if chosen.column is None:
            found.columns[expert] = statistic
        elif here:
            found.columns[expert] = chosen.column(matrices[expert - first], statistic)
        if chosen.expert and here:
            found.outputs[expert] = chosen.expert(matrices[expert - first], own)
    return found
