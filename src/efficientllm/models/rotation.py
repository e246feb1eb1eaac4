"""The residual stream turned into its principal components, once, before training: the function stays as it is.

An RMSNorm without a gain commutes with a rotation (SliceGPT, arXiv 2401.15024, theorem 1). So every gain is folded into
the layers that read behind it, and with Q (hidden, hidden), whose columns are the components,

    embedding E Q,    what writes to the stem Q^T W,    what reads it W diag(gain) Q,    gains 1.

Where a little energy lies in many components, they are the residual channels that a run can do without. Sliced are here
none: the result is a model of the same family and shape, which is then pruned as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from efficientllm.models.parts import body
from efficientllm.models.space import space_of
from efficientllm.pruning.dimensions import HIDDEN
from efficientllm.pruning.groups import ParamSpec, Space


def obstacle(config: PretrainedConfig) -> str | None:
    """Why the stem of a model with this config cannot be turned exactly, as a clause; None where it can."""
    if config.tie_word_embeddings:
        return "its LM head is its embedding, so that the final norm's gain cannot be folded into the head alone"
    if space_of(config).closing:
        return "its sublayers end in norms, whose gains stand between what they write and the stem"
    return None


@torch.no_grad()
def components(model: Any, inputs: Iterable[Mapping[str, Any]]) -> Tensor:
    """Principal components of what the stem's norms give before their gains, over all of them alike: fp64 (hidden,
    hidden) on the model's device, a column each, largest first. inputs: what the model's body is called with."""
    gains = [spec.name for spec in space_of(model.config).params if _is_gain(spec)]
    total: Tensor | None = None

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        states = args[0].flatten(0, -2).double()
        states = states / states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        total = states.T @ states if total is None else total.addmm_(states.T, states)

    norms = [model.get_submodule(name.removesuffix(".weight")) for name in gains]
    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        for each in inputs:
            body(model)(**each)
    finally:
        for handle in handles:
            handle.remove()
    assert total is not None, "components of nothing"
    return torch.linalg.eigh(total).eigenvectors.flip(-1)


@torch.no_grad()
def rotate(model: nn.Module, turn: Tensor) -> None:
    """Turns the stem in place by an orthogonal fp64 matrix (hidden, hidden); the model must have no `obstacle`."""
    space = space_of(model.config)  # type: ignore[arg-type]
    weights = dict(model.named_parameters())
    turn = turn.to(next(iter(weights.values())).device)
    gain: Tensor | None = None  # of the last norm: a layer's weights stand in the order of their use
    for spec in space.params:
        weight = weights[spec.name]
        if _is_gain(spec):
            gain = weight.double() + space.offsets.get(spec.name, 0.0)
            weight.fill_(1.0 - space.offsets.get(spec.name, 0.0))
            continue
        exact = weight.double()
        if _reads(spec, space):
            assert gain is not None, f"{spec.name} reads the stem without a norm"
            exact = (exact * gain) @ turn
        elif spec.axes[-1] == HIDDEN:  # the embedding, or the bias of what writes
            exact = exact @ turn
        elif len(spec.axes) > 1 and spec.axes[-2] == HIDDEN:
            exact = turn.T @ exact
        else:
            continue
        weight.copy_(exact)


def _is_gain(spec: ParamSpec) -> bool:
    return spec.axes == (HIDDEN,) and "norm" in spec.name


def _reads(spec: ParamSpec, space: Space) -> bool:
    """Matrices, or one an expert, stacked."""
    return len(spec.axes) > 1 and spec.axes[-1] == HIDDEN and spec.name not in space.embeddings
