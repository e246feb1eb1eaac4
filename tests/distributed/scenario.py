"""What the processes of the distributed tests do (`main`): small runs whose outcome is written down by rank 0.

A single process takes the same path by `play(case, ALONE, FOLDER)`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from efficientllm.checkpoint.store import checkpoints, load, save
from efficientllm.config import DistributedConfig, PruneConfig, TrainConfig
from efficientllm.data.planes import Planes, with_planes
from efficientllm.data.rows import BEGINS, CONTEXT
from efficientllm.distributed.launch import joined
from efficientllm.distributed.layout import with_mesh
from efficientllm.distributed.ranks import World
from efficientllm.models.space import space_of
from efficientllm.pruning.contract import SCORES
from efficientllm.pruning.schedule import SpanSchedule
from efficientllm.pruning.shards import whole
from efficientllm.training.distillation import Distillation, LiveTeacher
from efficientllm.training.gradient import Precision
from efficientllm.training.loop import train_steps
from efficientllm.training.planning import options_and_milestones
from efficientllm.training.state import PruningPlan, TrainState, capture, restore, start

ROWS, LENGTH = 12, 16
PRECISION = Precision("cpu", False)


@dataclass(frozen=True)
class Case:
    """steps: of the run; begin: folder of checkpoints to go on from; leave: folder to leave one in, after the steps."""

    name: str
    family: str = "llama-gqa"
    shard: str = "full"
    steps: int = 5
    criterion: str | dict[str, str] = "taylor-element"
    correction: str = "second-order"
    target: str | dict[str, int] = "60%"
    loss: str = "plain"
    planes: int = 1  # of a row: labels for some tokens, documents of their own
    hidden: float = 0.0  # weight of a teacher's hidden states
    begin: str = ""
    leave: str = ""


class Batches:
    """The batch of a step is a function of the step alone. Of rows with planes the later ones have fewer labels."""

    def __init__(self, planes: int) -> None:
        self.planes = Planes(planes)

    def batch(self, step: int, part: slice = slice(None), /) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + step)
        ids = torch.randint(0, 61, (ROWS, LENGTH), generator=generator).numpy()
        marks = np.tril(np.full((ROWS, LENGTH), CONTEXT, dtype=np.uint8))
        marks[:, 5] |= BEGINS
        return torch.from_numpy(with_planes(ids, marks, self.planes, 0))[part]


# Looks of five rows, which divide unequally.
@patch("efficientllm.training.passes.LOOK_TOKENS", 5 * LENGTH)
@patch("efficientllm.training.passes.correction_tokens", lambda space: 5 * LENGTH)
@patch("efficientllm.training.optim.EPS", 1e-3)  # so that rounding moves no weight whose gradient is all but zero
def play(case: Case, ranks: World, folder: Path) -> None:
    """Runs a case and leaves NAME.json and NAME.safetensors: events, losses, and the state, whole."""
    tokens = 8 * ROWS * LENGTH
    train = TrainConfig.model_validate(
        {
            "tokens": tokens,
            "lr": 1e-3,
            "loss": case.loss,
            "micro_batch": 2,
            "batch_tokens": ROWS * LENGTH,
            "warmup": 0,
        }
    )
    choices = {"saliency": case.criterion, "correction": case.correction, "target": case.target, "align": 1}
    prune = PruneConfig.model_validate(choices | {"bound": 0.05, "floors": {"intermediate": 4}})
    model = tiny_model(case.family)
    options, milestones = options_and_milestones(prune, space_of(model.config))
    if options.correction is not None:  # exact: no stop that rounding moves
        options = replace(options, correction=replace(options.correction, tolerance=1e-6))
    source = milestones[-1].space.num_params()
    schedule = SpanSchedule(0, 6 * ROWS * LENGTH, source, milestones[-1].target)
    plan = PruningPlan(
        model.config,
        milestones,
        schedule,
        options,
        compact_at=0.05,
    )
    ranks = with_mesh(ranks, DistributedConfig(shard=case.shard), torch.device("cpu"), fits=True)
    if case.begin:
        snapshot = load(checkpoints(folder / case.begin)[-1], ranks)
        state = restore(snapshot, train, plan, "cpu", ranks)
    else:
        state = start(model, train, plan, ranks)
    events, losses, compactions = [], [], 0
    batches, taught = Batches(case.planes), None
    if case.hidden:
        taught = Distillation(LiveTeacher(tiny_model(case.family).eval(), streams=True), 0.5, 100, case.hidden)
    told = {"steps": case.steps, "precision": PRECISION, "batch_rows": ROWS, "distillation": taught}
    for record in train_steps(state, batches, train, plan, **told):
        losses.append(record.loss)
        compactions += record.compaction is not None
        for applied in record.prune.events if record.prune else ():
            events.append([state.step, applied.event.type, applied.event.units.tolist()])
    if case.leave:
        save(folder / case.leave, capture(state), ranks)
    write_down(folder / case.name, state, events, losses, compactions)


def write_down(path: Path, state: TrainState, events: list[object], losses: list[float], compactions: int) -> None:
    tensors = tensors_of(state)
    facts = {
        "events": events,
        "losses": losses,
        "compactions": compactions,
        "counts": [state.step, state.tokens, state.refresh_tokens, state.flops.total],
        "widths": state.space.widths.record(),
    }
    if state.ranks.leads:
        save_file(tensors, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(facts))


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Weights, moments and what the pruner keeps, each whole; a collective."""
    snapshot = capture(state)
    tensors = {name: whole(weight).clone() for name, weight in snapshot.weights.items()}
    for name, moments in snapshot.moments.items():
        tensors |= {f"{key}|{name}": whole(value).clone() for key, value in moments.items()}
    return tensors | {name: value.clone() for name, value in snapshot.pruner_tensors.items()}


def outcome(folder: Path, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """What is written down of a case: facts and tensors."""
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same zeros but in averages of scores, and fp32 sums in another order: relative 1e-3."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = float(value.float().abs().max()) or 1.0
        assert torch.equal(found[key] == 0, value == 0) or key.startswith(SCORES), f"{key}: other zeros"
        torch.testing.assert_close(
            found[key], value, rtol=1e-3, atol=2e-3 * scale, msg=lambda text, key=key: f"{key}: {text}"
        )


def main(folder: Path) -> None:
    with joined() as ranks:
        for case in json.loads((folder / "cases.json").read_text()):
            play(Case(**case), ranks, folder)
