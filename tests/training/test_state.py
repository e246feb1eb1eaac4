"""Compaction: the same function, moments in the new scale, the family it came from, nothing held twice."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import tiny_config, tiny_model
from efficientllm.checkpoint.store import load, save
from efficientllm.config import PruneConfig, TrainConfig
from efficientllm.distributed.ranks import Ranks
from efficientllm.errors import UsageError
from efficientllm.models.space import check_space, empty_model, space_of, widths_of
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.schedule import EverySchedule
from efficientllm.pruning.shapes import fitted
from efficientllm.training.compaction import compact
from efficientllm.training.planning import options_and_milestones
from efficientllm.training.snapshot import Counts, counts_of, cut, fill_model, model_of
from efficientllm.training.state import PruningPlan, TrainState, capture, restore, start

TRAIN = TrainConfig.model_validate({"tokens": 1000, "lr": 1e-3, "weight_decay": 0.0})
IDS = torch.arange(48).reshape(3, 16)


def run_of(model: PreTrainedModel) -> tuple[TrainState, PruningPlan]:
    target = "20%" if "stem" in space_of(model.config).types else "90%"  # of which experts alone fall
    prune = PruneConfig.model_validate({"target": target, "floors": {"intermediate": 4}, "align": 1})
    options, milestones = options_and_milestones(prune, space_of(model.config))
    plan = PruningPlan(model.config, milestones, EverySchedule(0, 1), options, 0.01)
    return start(model, TRAIN, plan), plan


def prune(state: TrainState, **events: int) -> None:
    """The first live unit of every row, so many times for each type."""
    assert state.pruner is not None
    live = state.pruner.live
    for pruning_type, number in events.items():
        for _ in range(number):
            units = live.units(pruning_type)
            event = Removal(pruning_type, torch.where(units.any(1), units.int().argmax(1), -1))
            live.remove(event)
            state.pruner.zero([event])
    state.pruner.at = replace(state.pruner.at, widths=live.widths())


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def backward(state: TrainState) -> torch.Tensor:
    state.optimizer.zero_grad()
    logits: torch.Tensor = state.model(input_ids=IDS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    if state.pruner:
        state.pruner.observe()
    return logits.detach()


def test_moments_are_those_of_a_run_that_was_always_narrow(family: str) -> None:
    """After one step (at rate 0) from empty moments they are (1 - b1) g and (1 - b2) g^2 of the narrow model's g."""
    state, plan = run_of(tiny_model(family))
    types = {name: 1 for name in state.space.types if state.space.widths.count(name) > 1}
    prune(state, **types | ({"stem": 3} if "stem" in types else {}))
    before = backward(state)
    for group in state.optimizer.param_groups:
        group["lr"] = 0.0
    state.optimizer.step()
    compact(state, state.live_widths, TRAIN, plan)
    torch.testing.assert_close(backward(state), before, rtol=1e-4, atol=1e-4)
    first, second = TRAIN.betas
    for name, weight in state.model.named_parameters():
        moments = state.optimizer.state[weight]
        assert weight.grad is not None
        torch.testing.assert_close(moments["exp_avg"], (1 - first) * weight.grad, rtol=1e-3, atol=1e-6, msg=name)
        squares = weight.grad.square()
        torch.testing.assert_close(moments["exp_avg_sq"], (1 - second) * squares, rtol=1e-3, atol=1e-8, msg=name)


def test_a_cut_snapshot_is_a_model_for_plain_transformers(family: str, tmp_path: Path) -> None:
    """Every type at once, a layer too, where layers differ as well; its config goes through JSON, as a checkpoint's."""
    state, plan = run_of(tiny_model(family, num_hidden_layers=3))
    widths = state.space.widths
    left = {"stem": 29} | (
        {"stem": 32, "expert_ffn": 8} if "experts" in widths.counts() else {}
    )  # what experts can read
    prune(
        state,
        **{
            name: widths.count(name) - left.get(name, widths.count(name) - 1)
            for name in state.space.types
            if widths.count(name) > 1 and name != "attention"
        },
    )
    before = state.model(input_ids=IDS).logits
    narrow = fitted(state.space, state.live_widths, widths)
    snapshot = cut(capture(state), narrow, plan.source)
    dead = ~snapshot.pruner_tensors["live.hidden"]  # one where hidden 29 does not fit, whose gains stay 0 as well
    assert int(dead.sum()) == narrow.hidden - state.live_widths.hidden
    assert not any(weight[dead].any() for weight in snapshot.weights.values() if weight.shape == dead.shape)
    snapshot.config = json.loads(json.dumps(snapshot.config))
    model_of(snapshot, "cpu").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_space(space_of(model.config), model)
    assert widths_of(model.config) == narrow
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)


def test_a_llama_is_a_llama_again_where_its_config_allows() -> None:
    state, plan = run_of(tiny_model("llama-gqa"))
    for channels, family in ((1, "mistral"), (3, "llama")):  # hidden 39, then 36, over 4 heads
        prune(state, stem=channels)
        before = state.model(input_ids=IDS).logits
        compact(state, state.live_widths, TRAIN, plan)
        assert state.model.config.model_type == family
        torch.testing.assert_close(state.model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert state.model.config.rms_norm_eps == tiny_config("llama-gqa").rms_norm_eps * 40 / 36


@pytest.mark.parametrize("compiles", [False, True])
def test_compaction_holds_no_old_tensor(compiles: bool, without_collector: None) -> None:
    """Not even until the garbage collector comes by, which on a GPU may be too late."""
    train = TRAIN.model_copy(update={"compile": compiles})
    state, plan = run_of(tiny_model("qwen3-gqa"))
    if compiles:  # as wrap does it, but nothing is compiled before the first call
        for block in state.model.model.layers:
            block.forward = torch.compile(block.forward, backend="eager")
        del block
    backward(state)
    state.optimizer.step()
    prune(state, ffn=5)
    old = [weakref.ref(weight) for weight in state.model.parameters()]
    old += [weakref.ref(value) for each in state.optimizer.state.values() for value in each.values()]
    compact(state, state.live_widths, train, plan)
    assert not [each for each in old if each() is not None]


def test_every_part_of_a_run_is_counted_or_made_anew() -> None:
    """A field that is neither would be lost on resume, and at a compaction."""
    made_anew = {"model", "optimizer", "space", "pruner", "runner", "ranks", "origin"}
    counts = {field.name for field in fields(Counts)}
    assert {field.name for field in fields(TrainState)} == counts | made_anew
    state, plan = run_of(tiny_model("llama-mha-tied"))
    for place, name in enumerate(sorted(counts - {"flops"}), start=1):
        setattr(state, name, place)
    state.flops.steps = 9
    before = counts_of(state)
    prune(state, ffn=5)
    compact(state, state.live_widths, TRAIN, plan)
    assert counts_of(state) == before


def test_cutting_a_snapshot_leaves_it_alone_unless_consumed() -> None:
    state, plan = run_of(tiny_model("llama-mha-tied"))
    prune(state, ffn=5)
    snapshot = capture(state)
    names = set(snapshot.weights)
    narrow = cut(snapshot, state.live_widths, plan.source)
    assert set(snapshot.weights) == names == set(narrow.weights)
    ranks = Ranks()
    cut(snapshot, state.live_widths, plan.source, consume=True, ranks=ranks)
    assert ranks.beats == len(names)  # each may be gathered over a slow network: the watch sees it go on
    assert not snapshot.weights
    assert not snapshot.moments


def test_a_checkpoint_whose_masks_are_not_the_model_s_is_refused(tmp_path: Path) -> None:
    """As where a version with another table of dimensions has saved it."""
    state, plan = run_of(tiny_model("llama-mha-tied"))
    for step, mask, said in ((1, None, "missing"), (2, torch.ones(2, 3), r"\(2, 3\)")):
        snapshot = capture(state)
        snapshot.step = step
        snapshot.pruner_tensors.pop("live.ffn")
        if mask is not None:
            snapshot.pruner_tensors["live.ffn"] = mask
        path = save(tmp_path, snapshot)
        with pytest.raises(UsageError, match=f"the mask of 'ffn' is {said}, where its model has .*; go on with the"):
            load(path)
    path = save(tmp_path, capture(state))
    restore(load(path), TRAIN, plan, "cpu")


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_missing_weight_is_not_made_up(family: str, missing: str) -> None:
    model = tiny_model(family)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    fill_model(empty_model(model.config), weights)
    del weights[missing]
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        fill_model(empty_model(model.config), weights)
