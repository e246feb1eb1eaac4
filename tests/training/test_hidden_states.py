"""Distillation from hidden states: the distance in fp64, what is left of the source, runs that go on bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import tiny_model
from efficientllm.checkpoint.store import load, save
from efficientllm.config import Recipe
from efficientllm.models.parts import logits_of
from efficientllm.pruning.groups import Removal
from efficientllm.training.compaction import compact
from efficientllm.training.distillation import Distillation, Lineage, LiveTeacher
from efficientllm.training.gradient import Precision, model_inputs, next_tokens
from efficientllm.training.loop import train_steps
from efficientllm.training.planning import pruning_plan
from efficientllm.training.state import PruningPlan, TrainState, capture, restore, start

CPU = Precision("cpu", bf16=False)
ROWS, LENGTH, STEPS, LAYERS = 4, 16, 8, 4
GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(0, 61, (2, 7), generator=GENERATOR)
LABELLED = torch.stack([IDS, torch.where(torch.rand(2, 7, generator=GENERATOR) < 0.5, IDS.roll(-1, 1), -100)], -1)


class Batches:
    def batch(self, step: int, part: slice = slice(None), /) -> Tensor:
        return torch.randint(0, 61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))[part]


def recipe(**train: Any) -> Recipe:
    train = {"tokens": STEPS * ROWS * LENGTH, "batch_tokens": ROWS * LENGTH, "micro_batch": 2, "lr": 1e-3} | train
    return Recipe.model_validate(
        {
            "source": "here",
            "data": {"train": "none", "sequence_length": LENGTH},
            "train": train,
            "prune": {"target": "60%", "end": "80%", "curve": "linear", "align": 1, "types": ["stem"]},
            "run": {"dir": "none"},
        }
    )


def begun(family: str, **train: Any) -> tuple[TrainState, PruningPlan, Recipe]:
    model, wanted = tiny_model(family, num_hidden_layers=LAYERS), recipe(**train)
    plan = pruning_plan(wanted, model.config)
    assert plan is not None
    return start(model, wanted.train, plan), plan, wanted


def teacher(family: str, seed: int = 0) -> Distillation:
    """Its weights could take a gradient, so that it shows if one reaches them."""
    model = tiny_model(family, seed=seed, num_hidden_layers=LAYERS).eval()
    return Distillation(LiveTeacher(model, streams=True), 0.5, 100, hidden=2.0)


def lose(state: TrainState, layers: Sequence[int], channels: Sequence[int]) -> None:
    assert state.pruner is not None
    cuts = [Removal("depth", torch.tensor([layer])) for layer in layers]
    cuts += [Removal("stem", torch.tensor([channel])) for channel in channels]
    for each in cuts:
        state.pruner.live.remove(each)
    state.pruner.zero(cuts)
    state.pruner.at = replace(state.pruner.at, widths=state.pruner.live.widths())


def loss_and_gradient(state: TrainState, taught: Distillation, rows: Tensor) -> tuple[float, dict[str, Tensor]]:
    assert state.pruner is not None
    model: Any = state.model
    model.zero_grad()
    lineage = Lineage.of(state.origin, state.pruner.live, state.device)
    loss = taught.summed_loss(model.model, logits_of(model), rows, CPU, lineage)
    loss.backward()
    return float(loss.detach()), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def apart_fp64(
    student: PreTrainedModel, source: PreTrainedModel, rows: Tensor, layers: dict[int, int], channels: dict[int, int]
) -> tuple[float, dict[str, Tensor]]:
    """The distance and its gradient, token by token, by hooks. layers, channels: the student's to the source's."""
    streams: list[dict[int, Tensor]] = []
    student, source = copy.deepcopy(student).double(), copy.deepcopy(source).double()
    student.zero_grad()
    for model in (student, source):
        seen: dict[int, Tensor] = {}
        streams.append(seen)
        for place, block in enumerate(model.model.layers):
            block.register_forward_hook(lambda _, args, out, at=place, seen=seen: seen.update({at: out}))
        model.model(**model_inputs(rows))
    total = torch.zeros((), dtype=torch.float64)
    for own, theirs in layers.items():
        for row, place in (next_tokens(rows) != -100).nonzero().tolist():
            s = streams[0][own][row, place, list(channels)]
            t = streams[1][theirs][row, place, list(channels.values())].detach()
            total = total + (s - t).square().mean() / (t.square().mean() + 1e-6) / len(layers)
    total.backward()
    zero = torch.zeros(())
    return float(total.detach()), {
        name: zero.expand(weight.shape) if weight.grad is None else weight.grad
        for name, weight in student.named_parameters()
    }


@pytest.mark.parametrize(
    ("family", "recomputes"),
    [("llama-mha-tied", False), ("qwen3-gqa", True), ("gemma2-gqa-tied", True), ("granite-gqa", False)],
)
def test_the_distance_is_of_what_is_left(family: str, recomputes: bool) -> None:
    """Of plain rows and of conversations, whose loss is on some tokens; before compactions and after each. The student
    gets its gradient, and neither what is dead of it nor the teacher gets any."""
    (state, plan, wanted), taught = begun(family, gradient_checkpointing=recomputes), teacher(family, seed=4)
    assert isinstance(taught.teacher, LiveTeacher)
    logits_alone, gone = Distillation(taught.teacher, 0.5, 100), set[int]()
    for layer, channels in ((2, (0, 7, 8, 39)), (0, (1, 2, 30, 31))):  # as numbered in the source, and then anew
        left = [channel for channel in range(40) if channel not in gone]
        lose(state, [layer], channels)
        gone |= {left[channel] for channel in channels}
        layers = {0: 0, 1: 1} if layer == 2 else {1: 1}  # of 0, 1 and 3, then of 1 and 3, all but the last
        before = None
        for compacted in (False, True):
            if compacted:
                compact(state, state.live_widths, wanted.train, plan)
                layers = dict(enumerate(layers.values()))
            stays = [channel for channel in range(40) if channel not in gone]
            own = range(len(stays)) if compacted else [left.index(channel) for channel in stays]
            for rows in (LABELLED, IDS):
                loss, gradient = loss_and_gradient(state, taught, rows)
                plain, without = loss_and_gradient(state, logits_alone, rows)
                want, wanted_gradient = apart_fp64(
                    state.model, taught.teacher.model, rows, layers, dict(zip(own, stays, strict=True))
                )
                assert want > 1
                assert loss - plain == pytest.approx(2.0 * want, rel=1e-4)
                for name, expected in wanted_gradient.items():
                    got = (gradient[name] - without[name]).double()
                    torch.testing.assert_close(got, 2.0 * expected.double(), rtol=1e-3, atol=1e-3, msg=name)
            assert before is None or loss == pytest.approx(before, rel=1e-4)
            before = loss
            if not compacted:
                dead = [place for place in range(len(left)) if place not in own]
                assert not gradient["model.embed_tokens.weight"][:, dead].any()
        assert state.origin["hidden"].nonzero().flatten().tolist() == stays
    assert state.origin["layers"].tolist() == [False, True, False, True]
    assert all(weight.grad is None for weight in taught.teacher.model.parameters())


def test_a_student_that_is_its_source_is_at_no_distance() -> None:
    state, _, _ = begun("llama-gqa")
    taught = teacher("llama-gqa")
    (loss, _), (plain, _) = (
        loss_and_gradient(state, each, IDS) for each in (taught, Distillation(taught.teacher, 0.5, 100))
    )
    assert loss == pytest.approx(plain, rel=1e-5)


def test_what_is_left_of_the_source_goes_through_checkpoints(tmp_path: Path) -> None:
    """A run that is stopped between two compactions, and goes on from the disk, ends with the same bits."""
    ends = []
    for stops in (False, True):
        (state, plan, wanted), taught = begun("qwen3-gqa"), teacher("qwen3-gqa")
        for step in (3, STEPS) if stops else (STEPS,):
            compactions = [
                record.compaction
                for record in train_steps(
                    state, Batches(), wanted.train, plan, steps=step, precision=CPU, distillation=taught
                )
            ]
            assert any(compactions)
            if step < STEPS:
                assert state.pruner is not None
                assert not state.pruner.finished
                assert not state.origin["hidden"].all()
                state = restore(load(save(tmp_path, capture(state))), wanted.train, plan, "cpu")
        ends.append(capture(state))
    whole, resumed = ends
    assert int(whole.pruner_tensors["origin.hidden"].sum()) == whole.config["hidden_size"] < 40
    for tensors in ("weights", "pruner_tensors"):
        for name, tensor in getattr(whole, tensors).items():
            assert torch.equal(getattr(resumed, tensors)[name], tensor), name
    assert whole.flops == resumed.flops
