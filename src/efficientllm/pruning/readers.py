"""Saliency by criteria that look at what linear layers read, and which layers read what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from efficientllm.pruning.criteria import Criterion
from efficientllm.pruning.dimensions import DIMENSIONS, EXPERT, LAYERS
from efficientllm.pruning.groups import Axis, ParamSpec, Space, labels
from efficientllm.pruning.saliency import AxisSums
from efficientllm.pruning.shards import ALONE, World, first_row, local


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
