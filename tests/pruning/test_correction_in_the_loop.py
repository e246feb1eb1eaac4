"""Corrections as the engine makes them: every reader of every type, exact where it matters, harmless everywhere."""

from __future__ import annotations

import copy

import torch

from conftest import tiny_model
from efficientllm.models.space import space_of
from efficientllm.pruning.correction import Corrections, SolverOptions, correct, corrected
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.live import Live
from efficientllm.pruning.readers import losing_readers
from efficientllm.training.hooks import captured_inputs
from reference.correction_fp64 import dense_coefficients

PRECISE = SolverOptions(damping=0.05, tolerance=1e-5, iterations=400)
IDS = torch.randint(0, 61, (6, 40), generator=torch.Generator().manual_seed(5))
READERS = {
    "attention": {"self_attn.o_proj"},
    "attention_query": {"self_attn.o_proj"},
    "ffn": {"mlp.down_proj"},
    "depth": set(),
    "stem": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}
    | {"self_attn.qkv_proj", "mlp.gate_up_proj"},
    "expert": set(),
    "expert_ffn": {"mlp.experts.down_proj"},
}


def events_of(live: Live, pruning_type: str, number: int = 2) -> list[Removal]:
    """The first live units of every row."""
    events = []
    for _ in range(min(number, int(live.units(pruning_type).sum(1).max()) - 1)):
        units = live.units(pruning_type)
        events.append(Removal(pruning_type, torch.where(units.any(1), units.int().argmax(1), -1)))
        live.remove(events[-1])
    return events


def test_every_reader_gets_the_dense_solution(family: str) -> None:
    """With one unit of each type dead already, which no correction may call back."""
    space = space_of(tiny_model(family).config)
    for pruning_type in space.types:
        if space.widths.count(pruning_type) > 1:
            has_the_dense_solution(family, pruning_type)


def has_the_dense_solution(family: str, pruning_type: str) -> None:
    model = tiny_model(family)
    space = space_of(model.config)
    live = Live.full(space.widths)
    mixture = "experts" in space.widths.counts()
    for first in {"stem", "expert_ffn" if mixture else "ffn"} & set(space.types):
        events_of(live, first, 1)
    events = events_of(live, pruning_type)
    readers = list(losing_readers(space, events, live))
    heads = {"lm_head.weight"} if pruning_type == "stem" and not model.config.tie_word_embeddings else set()
    layers = range(space.widths.layers)
    expected = {f"model.layers.{i}.{part}.weight" for i in layers for part in READERS[pruning_type]}
    if mixture:
        fused = {"mlp.gate_proj.weight": "mlp.gate.weight", "mlp.up_proj.weight": "mlp.experts.gate_up_proj"}
        fused["mlp.experts.down_proj.weight"] = "mlp.experts.down_proj"
        for old, new in fused.items():
            expected = {name.replace(old, new) for name in expected}
    assert {reader.name for reader in readers} == (expected & dict(model.named_parameters()).keys()) | heads
    with torch.no_grad(), captured_inputs(model, [reader.name for reader in readers]) as inputs:
        model(input_ids=IDS)
    before = {reader.name: model.get_parameter(reader.name).detach().clone() for reader in readers}
    assert correct(dict(model.named_parameters()), readers, inputs, PRECISE) == Corrections(len(readers), 0)
    for reader in readers:
        b = dense_coefficients(inputs[reader.source], reader.removed, reader.kept, PRECISE.damping)
        old, new = before[reader.name], model.get_parameter(reader.name).detach()
        if reader.expert is not None:
            old, new = old[reader.expert], new[reader.expert]
        want, got = corrected(old.double(), reader.removed, b), new.double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert torch.equal(got[..., ~reader.kept], want[..., ~reader.kept])


def test_an_expert_that_few_tokens_have_chosen_is_left_as_it_is() -> None:
    """Fewer than it has inputs: the router of layer 0 sends all tokens to experts 0 and 1."""
    model = tiny_model("qwen3-moe-gqa")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2:] = 0.0  # dead, and so never chosen
    space = space_of(model.config)
    live = Live.full(space.widths)
    readers = list(losing_readers(space, events_of(live, "expert_ffn", 1), live))
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    with torch.no_grad(), captured_inputs(model, [reader.name for reader in readers]) as inputs:
        model(input_ids=IDS)
    report = correct(dict(model.named_parameters()), readers, inputs, PRECISE)
    assert (report.done, report.skipped, report.starved) == (2 + 5, 0, 3)
    after = model.model.layers[0].mlp.experts.down_proj
    assert torch.equal(after[2:], before[2:])
    assert not torch.equal(after[:2], before[:2])


def test_a_failed_solve_leaves_the_weight_and_is_counted() -> None:
    model = tiny_model("llama-gqa")
    before = copy.deepcopy(model.state_dict())
    space = space_of(model.config)
    live = Live.full(space.widths)
    readers = list(losing_readers(space, events_of(live, "ffn"), live))
    with torch.no_grad(), captured_inputs(model, [reader.name for reader in readers]) as inputs:
        model(input_ids=IDS)
    hasty = SolverOptions(damping=1e-8, tolerance=1e-6, iterations=1)
    assert correct(dict(model.named_parameters()), readers, inputs, hasty) == Corrections(0, len(readers))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_losing_a_copied_channel_costs_the_model_nothing() -> None:
    """Every layer has an FFN channel that computes what another one does: with the correction no logit moves."""
    model = tiny_model("qwen2-gqa-tied").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight[0] = weight[1]
        want = model(input_ids=IDS).logits
    space = space_of(model.config)
    live = Live.full(space.widths)
    readers = list(losing_readers(space, events_of(live, "ffn", 1), live))
    with torch.no_grad(), captured_inputs(model, [reader.name for reader in readers]) as inputs:
        model(input_ids=IDS)
    exact = SolverOptions(damping=1e-6, tolerance=1e-6, iterations=400)
    correct(dict(model.named_parameters()), readers, inputs, exact)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=1e-3, atol=1e-3)
