"""Looks during training: rows to come, no teacher, captured inputs, and a gradient norm without what is cleared."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_model
from efficientllm.checkpoint.store import load, save
from efficientllm.config import Recipe
from efficientllm.pruning.dimensions import ATTENTION_QUERY
from efficientllm.pruning.slices import dead_slices
from efficientllm.training.distillation import Distillation, LiveTeacher
from efficientllm.training.gradient import Precision, summed_loss
from efficientllm.training.hooks import captured_inputs
from efficientllm.training.loop import train_steps
from efficientllm.training.passes import rows_by_use
from efficientllm.training.planning import pruning_plan
from efficientllm.training.state import TrainState, capture, restore, start

CPU = Precision("cpu", bf16=False)
ROWS, LENGTH, STEPS = 8, 256, 6  # a look is two rows


class Remembered:
    """Batches of random rows; remembers (step, rows) of what was read."""

    def __init__(self) -> None:
        self.read: list[tuple[int, tuple[int, ...]]] = []

    def batch(self, step: int, part: slice = slice(None), /) -> Tensor:
        self.read.append((step, tuple(range(ROWS)[part])))
        return torch.randint(0, 61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))[part]


def recipe(**prune: Any) -> Recipe:
    train = {"tokens": STEPS * ROWS * LENGTH, "batch_tokens": ROWS * LENGTH, "micro_batch": 4, "lr": 1e-3}
    floors = {"intermediate": 8}
    return Recipe.model_validate(
        {
            "source": "here",
            "data": {"train": "none", "sequence_length": LENGTH},
            "train": train,
            "prune": {"target": "60%", "end": "50%", "floors": floors, "align": 1} | prune,
            "run": {"dir": "none"},
        }
    )


def run(wanted: Recipe, teacher: Distillation | None = None) -> tuple[TrainState, Remembered, list[Any]]:
    model = tiny_model("llama-gqa", max_position_embeddings=LENGTH)
    plan, batches = pruning_plan(wanted, model.config), Remembered()
    state = start(model, wanted.train, plan)
    records = []
    for record in train_steps(state, batches, wanted.train, plan, steps=STEPS, precision=CPU, distillation=teacher):
        records.append((record, len(batches.read)))
    return state, batches, records


@pytest.mark.parametrize("more", [{}, {"saliency": "wanda"}, {"mode": "iterative", "end": None}])
def test_looks_read_other_rows_each_time_and_cost_training_none(more: dict[str, Any]) -> None:
    """Of batches to come; a step's looks share no row, and training still reads every batch, whole and in order."""
    state, batches, records = run(recipe(**more))
    assert state.tokens == STEPS * ROWS * LENGTH
    done = 0
    for step, (record, end) in enumerate(records):
        (own, rows), *looks = batches.read[done:end]
        done = end
        assert (own, rows) == (step, tuple(range(ROWS)))
        seen = [(other, row) for other, part in looks for row in part]
        assert len(seen) == len(set(seen))
        assert all(other >= step + ("mode" not in more) for other, _ in seen)
        report = record.prune
        assert not looks or report.refreshes >= 1
        assert step or len(looks) >= 4
    assert state.refresh_tokens == 2 * LENGTH * sum(record.prune.refreshes for record, _ in records if record.prune) * (
        "saliency" not in more
    )


def test_no_tokens_are_spent_at_rest() -> None:
    """Every event comes before the first step, whose update is at the rate of any run's first."""
    plain = run(recipe())[2]
    for mode in ("one-shot", "iterative"):
        bound = {"bound": None} if mode == "one-shot" else {}
        state, _, records = run(recipe(mode=mode, end=None, **bound))
        first = records[0][0]
        assert state.pruner is not None
        assert state.pruner.finished
        assert len(first.prune.events) == state.pruner.at.events > 10
        assert first.compaction is not None
        assert [record.lr for record, _ in records] == [record.lr for record, _ in plain]
        assert min(record.lr for record, _ in records) > 0
        assert first.prune.refreshes >= (32 if mode == "one-shot" else 4)


def test_a_teacher_is_not_asked_when_looking() -> None:
    asked: list[int] = []

    class Counted(LiveTeacher):
        def says(self, rows: Tensor) -> tuple[Tensor, ...]:
            asked.append(len(rows))
            return super().says(rows)

    teacher = Counted(tiny_model("llama-gqa", max_position_embeddings=LENGTH).eval())
    state, _, records = run(recipe(), Distillation(teacher, 0.5, 100))
    assert any(record.prune.refreshes for record, _ in records if record.prune)
    assert sum(asked) == STEPS * ROWS
    assert state.flops.teacher == STEPS * teacher.flops(ROWS, LENGTH)


def test_the_norm_is_of_what_training_goes_by() -> None:
    """Columns of o_proj that read dead query heads have a gradient, which is cleared and so must not clip the rest."""
    more = {"types": [ATTENTION_QUERY], "target": "85%", "start": 0, "end": None, "every": 1}
    wanted = recipe(correction="none", **more)
    model = tiny_model("llama-gqa", max_position_embeddings=LENGTH, num_attention_heads=8)
    plan, batches = pruning_plan(wanted, model.config), Remembered()
    assert plan is not None
    plan = replace(plan, compact_at=1.0)
    state = start(model, wanted.train, plan)
    steps = train_steps(state, batches, wanted.train, plan, steps=2, precision=CPU)
    assert next(steps).prune.events  # type: ignore[union-attr]
    assert state.pruner is not None
    assert not state.pruner.finished
    twin = copy.deepcopy(state.model)
    (summed_loss(twin, batches.batch(1), CPU) / (ROWS * (LENGTH - 1))).backward()
    gradients = {name: weight.grad for name, weight in twin.named_parameters()}
    whole = math.sqrt(sum(float(each.square().sum()) for each in gradients.values()))
    for part in dead_slices(state.space, state.pruner.live):
        gradients[part.name].index_fill_(part.dim, part.indices, 0.0)
    cleared = math.sqrt(sum(float(each.square().sum()) for each in gradients.values()))
    assert whole > cleared * (1 + 1e-4)
    assert next(steps).grad_norm == pytest.approx(cleared, rel=1e-5)


def test_captured_rows_are_spread_over_the_batch_whatever_the_micro_batches() -> None:
    model, rows = tiny_model("llama-gqa").eval(), torch.arange(8 * 16).reshape(8, 16) % 61
    names = ["model.layers.0.mlp.down_proj.weight", "lm_head.weight"]
    kept = []
    for sizes in ((8,), (3, 3, 2), (1,) * 8):
        with torch.no_grad(), captured_inputs(model, names, every=3, waits=True) as inputs:
            first = 0
            for part in rows.split(sizes):
                with inputs.taken(first):
                    model(input_ids=part)
                model(input_ids=part)  # as a layer that is computed again: not kept
                first += len(part)
        kept.append({name: inputs[name] for name in names})
    with torch.no_grad(), captured_inputs(model, names) as inputs:
        model(input_ids=rows[::3])
    for each in kept:
        for name in names:
            torch.testing.assert_close(each[name], inputs[name], rtol=1e-4, atol=1e-5)


def test_rows_of_a_look() -> None:
    plan = pruning_plan(recipe(), tiny_model("llama-gqa").config)
    assert plan is not None
    assert rows_by_use(plan, 8, 256) == {"step": 8, "gradient": 2, "text": 2, "inputs": 2}  # 52 inputs at most
    assert rows_by_use(plan, 1024, 256) == {"step": 1024, "gradient": 256, "text": 32, "inputs": 2}
    assert rows_by_use(plan, 4, 64) == {"step": 4, "gradient": 4, "text": 4, "inputs": 4}  # never more than a batch
    assert rows_by_use(plan, 64, 256, processes=8)["inputs"] == 8


def test_a_run_goes_on_bit_for_bit_with_its_looks_and_its_bill(tmp_path: Path) -> None:
    """Cut in the middle of pruning: scores, what has fallen since the last look and FLOPs by part come back."""
    wanted, path = recipe(end="80%"), tmp_path / "checkpoints"
    whole, _, _ = run(wanted)
    model = tiny_model("llama-gqa", max_position_embeddings=LENGTH)
    plan = pruning_plan(wanted, model.config)
    state = start(model, wanted.train, plan)
    for _ in train_steps(state, Remembered(), wanted.train, plan, steps=2, precision=CPU):
        pass
    assert state.pruner is not None
    assert not state.pruner.finished
    state = restore(load(save(path, capture(state))), wanted.train, plan, "cpu")
    for _ in train_steps(state, Remembered(), wanted.train, plan, steps=STEPS, precision=CPU):
        pass
    assert state.flops == whole.flops
    assert state.refresh_tokens == whole.refresh_tokens
    one, other = capture(state), capture(whole)
    assert one.pruner_facts == other.pruner_facts
    for name, weight in other.weights.items():
        assert torch.equal(one.weights[name], weight), name
    for name, tensor in other.pruner_tensors.items():
        assert torch.equal(one.pruner_tensors[name], tensor), name
