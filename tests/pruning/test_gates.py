"""Gate Fisher against gates that are there: one a unit and token, closed by autograd in fp64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from conftest import tiny_model
from efficientllm.models.parts import recompute
from efficientllm.models.space import space_of
from efficientllm.pruning.gates import GateSums, bounded
from efficientllm.training.hooks import watched_gates

IDS = torch.randint(0, 61, (5, 20), generator=torch.Generator().manual_seed(1))
PREDICTED = 5 * 19
STEM_READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")


def mean_loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Of the look's mean: its rows' summed loss over all that is predicted in the look."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum") / PREDICTED


def reference(family: str, pruning_type: str, row: int, unit: int) -> float:
    """Half the mean over predictions of (dL/dc_t)^2, c_t a gate of the unit at token t and L the summed loss."""
    model = tiny_model(family).double()
    widths, gate = space_of(model.config).widths, torch.ones(IDS.shape, dtype=torch.float64, requires_grad=True)
    hd, group = model.config.head_dim, widths.queries_per_kv
    whole = slice(None)
    with ExitStack() as hooks:

        def close(module: torch.nn.Module, part: slice) -> None:
            def gated(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                chosen = torch.zeros(args[0].shape[-1], dtype=torch.float64)
                chosen[part] = 1.0
                return (args[0] * (1.0 + (gate[..., None] - 1.0) * chosen), *args[1:])

            hooks.callback(module.register_forward_pre_hook(gated).remove)

        experts = widths.counts().get("experts", 0)
        for number, layer in enumerate(model.model.layers):
            if experts:
                layer.mlp.experts.forward = partial(experts_forward, layer.mlp.experts, gate, range(0), whole)
            if pruning_type == "stem":
                if experts:
                    close(layer.mlp, slice(unit, unit + 1))
                for name, module in layer.named_modules():
                    if name.rpartition(".")[2] in STEM_READERS:
                        close(module, slice(unit, unit + 1))
            elif pruning_type == "depth" and number == unit and hasattr(layer, "post_feedforward_layernorm"):
                for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                    hook = norm.register_forward_hook(lambda module, args, out: out * gate[..., None])
                    hooks.callback(hook.remove)
            elif pruning_type == "depth" and number == unit:
                close(layer.self_attn.o_proj, whole)
                if experts:
                    layer.mlp.experts.forward = partial(experts_forward, layer.mlp.experts, gate, range(experts), whole)
                else:
                    close(layer.mlp.down_proj, whole)
            elif pruning_type == "expert" and number == row:
                layer.mlp.experts.forward = partial(experts_forward, layer.mlp.experts, gate, [unit], whole)
            elif pruning_type == "expert_ffn" and number == row // experts:
                layer.mlp.experts.forward = partial(
                    experts_forward, layer.mlp.experts, gate, [row % experts], slice(unit, unit + 1)
                )
            elif pruning_type == "ffn" and number == row:
                close(layer.mlp.down_proj, slice(unit, unit + 1))
            elif pruning_type == "attention" and number == row:
                close(layer.self_attn.o_proj, slice(unit * group * hd, (unit + 1) * group * hd))
            elif pruning_type == "attention_query" and number == row // widths.kv_heads:
                head = row % widths.kv_heads * group + unit
                close(layer.self_attn.o_proj, slice(head * hd, (head + 1) * hd))
        if pruning_type == "stem":
            close(model.lm_head, slice(unit, unit + 1))
        (gradient,) = torch.autograd.grad(mean_loss(model, IDS) * PREDICTED, gate)
    return float(gradient.square().sum() / PREDICTED / 2)


def experts_forward(
    experts: Any, gate: Tensor, gated: Sequence[int], part: slice, states: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """transformers' experts one by one, with a gate at every token of some channels of some of them."""
    total = torch.zeros_like(states)
    for expert in range(len(experts.down_proj)):
        chosen = torch.zeros(experts.down_proj.shape[-1], dtype=torch.float64)
        if expert in gated:
            chosen[part] = 1.0
        tokens, place = (index == expert).nonzero(as_tuple=True)
        low, high = (states[tokens] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = functional.silu(low) * high * (1.0 + (gate.flatten()[tokens, None] - 1.0) * chosen)
        total = total.index_add(0, tokens, inner @ experts.down_proj[expert].T * weights[tokens, place, None])
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_equal_the_reference(family: str, checkpointing: bool) -> None:
    model = tiny_model(family)
    if checkpointing:
        model.train()
        recompute(model)
    gates = GateSums(space_of(model.config), torch.device("cpu"))
    with watched_gates(model, space_of(model.config), gates) as watch:
        for first in (0, 2, 4):
            with watch(first):
                loss = mean_loss(model, IDS[first : first + 2])
            loss.backward()
        mean_loss(model, IDS[:1]).backward()  # one that does not count
    scores = gates.scores()
    assert_reference(scores, family)
    assert not model.model.layers[0].self_attn.o_proj._forward_pre_hooks


def test_passes_may_overlap() -> None:
    """Two forward passes of unequal length before one backward pass, and a third that none follows."""
    model = tiny_model("llama-gqa")
    space = space_of(model.config)
    together, apart = (GateSums(space, torch.device("cpu")) for _ in range(2))
    parts = IDS[:2, :9], IDS[2:]
    with watched_gates(model, space, together) as watch:
        losses = []
        for part in (*parts, IDS[:1]):
            with watch(0):
                losses.append(mean_loss(model, part))
        (losses[0] + losses[1]).backward()
    for part in parts:
        with watched_gates(model, space, apart) as watch:
            with watch(0):
                loss = mean_loss(model, part)
            loss.backward()
    for name, score in apart.scores().items():
        torch.testing.assert_close(together.scores()[name], score)


def test_no_token_outweighs_the_rest() -> None:
    """Of 240 tokens the two largest may be as large as the second; what is the rest's stays as it is."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(240, 3, 2, generator=generator).double()
    gradients[10], gradients[17], gradients[100:110] = 1e4 * gradients[10], 30.0 * gradients[17], 0.0
    want = gradients.clone()
    want[10] *= float(gradients[17].norm() / gradients[10].norm())
    torch.testing.assert_close(bounded(gradients.float()), want.float())
    torch.testing.assert_close(bounded(gradients[:199].float()), gradients[:199].float(), rtol=0, atol=0)
    gradients[3] = float("nan")
    assert not bounded(gradients).isfinite().all()
    assert bounded(gradients.to("meta")).shape == gradients.shape  # no value is waited for, where a GPU computes


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-moe-gqa"])
def test_a_spike_of_a_single_token_moves_no_score(family: str) -> None:
    """A token whose loss counts ten thousand times as much, as gradients at a text's first tokens can."""
    model = tiny_model(family)
    space = space_of(model.config)
    rows = torch.randint(0, 61, (5, 60), generator=torch.Generator().manual_seed(2))
    found = []
    for weight in (1.0, 1e4):
        gates, weights = GateSums(space, torch.device("cpu")), torch.ones(5, 59)
        weights[2, 0] = weight
        with watched_gates(model, space, gates) as watch:
            with watch(0):
                logits = model(input_ids=rows, use_cache=False).logits[:, :-1].transpose(1, 2)
                losses = functional.cross_entropy(logits, rows[:, 1:], reduction="none")
            (losses * weights).mean().backward()
        found.append(gates.scores())
    for name, scores in found[0].items():
        assert float(found[1][name].sum() / scores.sum()) == pytest.approx(1.0, abs=0.25), name


def assert_reference(scores: Mapping[str, Tensor], family: str) -> None:
    for pruning_type in scores:
        rows, units = scores[pruning_type].shape
        for row, unit in {(0, 0), (rows - 1, units - 1), (rows // 2, units // 2)}:
            want = reference(family, pruning_type, row, unit)
            assert float(scores[pruning_type][row, unit]) == pytest.approx(want, rel=1e-3)
