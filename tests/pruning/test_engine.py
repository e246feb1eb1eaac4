"""The two calls in a loop: fixed points, final shapes, resumed state."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from conftest import tiny_model
from efficientllm.models.space import space_of
from efficientllm.pruning.decision import Standing
from efficientllm.pruning.dimensions import ATTENTION_QUERY
from efficientllm.pruning.engine import OtherRule, PruningEngine
from efficientllm.pruning.shards import fill, local_place
from efficientllm.pruning.slices import group_slices
from pruning.engine_loop import MIXED, Loop


def test_zeroed_groups_stay_exactly_zero(family: str) -> None:
    """Weights and Adam moments, over 20 AdamW steps with weight decay and clipping."""
    space = space_of(tiny_model(family).config)
    for pruning_type in space.types:
        if space.widths.count(pruning_type) > space.least(pruning_type):
            stays_zero(family, pruning_type)


def stays_zero(family: str, pruning_type: str) -> None:
    loop = Loop(family, share=0.97, span=1.0, types=(pruning_type,))
    report = loop.train_step(1.0)
    events = [applied.event for applied in report.events]
    assert loop.pruner.finished
    assert events
    for step in range(20):
        loop.train_step(2.0 + step)
    for part in group_slices(loop.space, events):
        for tensor in (loop.params[part.name], *loop.moments(part.name).values()):
            place = local_place(tensor, part.dim, part.indices, part.rows)
            assert not tensor.detach()[place].any(), part.name


def test_dead_query_heads_need_the_care_of_observe() -> None:
    """Without it o_proj's columns come back to life: a zero query attends evenly and so reads the live values."""
    loop = Loop("llama-gqa", share=0.97, span=1.0, types=(ATTENTION_QUERY,))
    events = [applied.event for applied in loop.train_step(1.0).events]
    loop.train_step(2.0, observe=False)
    revived = [
        part.name
        for part in group_slices(loop.space, events)
        if loop.params[part.name].detach().index_select(part.dim, part.indices).any()
    ]
    assert revived
    assert all(name.endswith("o_proj.weight") for name in revived)


def test_lands_on_target_with_uniform_layers(family: str) -> None:
    loop = Loop(family, share=0.7 if family.startswith("olmoe") else 0.4)  # of which experts alone fall
    for step in range(1, 11):
        loop.train_step(float(step))
    pruner = loop.pruner
    assert pruner.finished
    assert pruner.feasible.reached(pruner.widths)
    assert pruner.parameters <= pruner.feasible.target
    live = pruner.live
    ffn = live["expert_ffn"].sum(2)[live["expert"]] if "experts" in pruner.widths.counts() else live["ffn"].sum(1)
    assert len(set(ffn.tolist())) == 1
    assert len(set(live["kv"].sum(1).tolist())) == 1
    queries = live["query"].sum(2)[live["kv"]]
    assert len(set(queries.tolist())) == 1
    zeros = sum(int((weight == 0).sum()) for weight in loop.params.values())
    assert zeros == loop.space.num_params() - pruner.parameters


def test_a_dead_layer_is_the_identity_and_stays_dead(family: str) -> None:
    """The floors leave no way to the target but by a layer."""
    floors = {"hidden": 40, "intermediate": 26, "expert_intermediate": 12}
    ffn = "expert_ffn" if "moe" in family else "ffn"
    types = ("depth", ffn) if "olmoe" in family else ("depth", ffn, "stem")
    loop = Loop(family, share=0.6, span=3.0, types=types, num_hidden_layers=3, floors=floors)
    for step in range(1, 12):
        loop.train_step(float(step))
    live = loop.pruner.live
    assert loop.pruner.finished
    assert 1 <= int(live["layers"].sum()) < 3
    dead = int((~live["layers"]).int().argmax())
    assert not live[ffn][dead].any()
    assert not live["kv"][dead].any()
    weights = [weight for name, weight in loop.params.items() if f"layers.{dead}." in name]
    assert not any(bool(weight.any()) for weight in weights)
    seen: list[torch.Tensor] = []

    def watch(_module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.extend((args[0], out))

    loop.model.model.layers[dead].register_forward_hook(watch)
    loop.loss()
    assert torch.equal(*seen)


def test_a_dead_layer_s_output_bias_stays_dead() -> None:
    """Qwen3 with attention_bias has a bias on o_proj, which a gradient reaches although the layer is zero."""
    loop = Loop("qwen3-gqa", share=0.7, span=1.0, types=("depth",), config={"attention_bias": True})
    for step in range(1, 9):
        loop.train_step(float(step))
    dead = int((~loop.pruner.live["layers"]).int().argmax())
    assert not loop.pruner.live["layers"][dead]
    assert not loop.params[f"model.layers.{dead}.self_attn.o_proj.bias"].any()


def test_an_event_without_correction_changes_nothing_but_its_groups(family: str) -> None:
    loop = Loop(family, share=0.9, span=1000.0, correction=None)
    loop.ids = torch.arange(48).reshape(4, 12)
    loop.gradient([])
    loop.pruner.observe()
    before = {name: weight.detach().clone() for name, weight in loop.params.items()}
    report = loop.pruner.step(0.0, loop)
    assert report.events == []
    report = loop.pruner.step(1.0, loop)
    assert report.events
    for part in group_slices(loop.space, [applied.event for applied in report.events]):
        fill(before[part.name], part.dim, part.indices, part.rows)
    for name, weight in loop.params.items():
        assert torch.equal(weight.detach(), before[name]), name


@pytest.mark.parametrize("saliency", ["taylor-element", "gate-fisher", MIXED])
def test_state_resumes_bit_for_bit(saliency: str | dict[str, str]) -> None:
    one, two = Loop("qwen2-gqa-tied", saliency=saliency), Loop("qwen2-gqa-tied", saliency=saliency)
    for step in range(1, 5):
        one.train_step(float(step))
        two.train_step(float(step))
    tensors, facts = one.pruner.state()
    old = two.pruner
    two.pruner = PruningEngine(
        two.space,
        two.params,
        two.moments,
        milestones=old.course.milestones,
        schedule=old.course.schedule,
        options=old.options,
    )
    two.pruner.load_state(tensors, facts)
    for step in range(5, 11):
        one.train_step(float(step))
        two.train_step(float(step))
    for name, weight in one.params.items():
        assert torch.equal(weight, two.params[name])
    assert one.pruner.finished
    assert one.pruner.widths == two.pruner.widths


@pytest.mark.parametrize(("measured", "finished"), [({}, False), ({"ffn": 0.1}, False), ({"ffn": 0.1}, True)])
def test_a_run_that_compared_types_by_measured_losses_goes_on_only_once_it_is_over(
    measured: dict[str, float], finished: bool
) -> None:
    """The state of an earlier version, of which another rule would choose what is still to fall."""
    loop, fresh = Loop("llama-gqa", correction=None), Loop("llama-gqa", correction=None).pruner
    for step in range(1, 11 if finished else 5):
        loop.train_step(float(step))
    tensors, facts = loop.pruner.state()
    facts["calibration"] = {"smoothing": 0.5, "units": {}, "measured": measured, "predicted": measured}
    assert loop.pruner.finished == finished
    refused = bool(measured) and not finished
    with pytest.raises(OtherRule, match="compared by measured losses") if refused else nullcontext():
        fresh.load_state(tensors, facts)
    assert fresh.at == (Standing(fresh.space.widths, 0, 0) if refused else loop.pruner.at)
    untouched = all(map(torch.all, fresh.live.values()))
    assert untouched == (not fresh.looks.complete) == refused
