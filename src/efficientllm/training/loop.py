"""The training loop, top to bottom. It yields after every step; files, bars and validation are its caller's."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.shards import local
from efficientllm.training.compaction import Compaction, compact, compaction_widths
from efficientllm.training.distillation import Distillation
from efficientllm.training.gradient import Precision, gradient_norm, update
from efficientllm.training.optim import learning_rate
from efficientllm.training.state import PruningPlan, TrainState
from efficientllm.training.step import Batches, OwnBatches

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig
    from efficientllm.training.vocabulary import Vocabulary


MOST_SKIPPED = 3  # one bad batch is an accident; after a few in a row the weights are to blame


class Diverged(Exception):
    """Loss or gradient is not finite, several steps in a row; the weights are as the last good step left them."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did. loss in nats per token, before the update; seconds cover the whole step."""

    loss: float
    lr: float
    grad_norm: float
    seconds: float
    prune: PruneReport | None
    compaction: Compaction | None


def train_steps(
    state: TrainState,
    batches: Batches,
    train: TrainConfig,
    plan: PruningPlan | None,
    *,
    steps: int,
    precision: Precision,
    batch_rows: int = 0,
    distillation: Distillation | None = None,
    vocabulary: Vocabulary | None = None,
) -> Generator[StepRecord, None, None]:
    """Trains until `steps` optimizer steps are done, pruning as planned; yields after each step.

    Looks of pruning read rows of the batches to come and use up no tokens. Pruning at rest comes before a step, all
    else after one. A step whose loss or gradient is not finite is skipped: its batch is read, weights, moments and
    scores stay as they were, nothing is pruned. Raises Diverged after MOST_SKIPPED of them in a row. batch_rows: of a
    whole batch, where several processes share it. vocabulary: where tokens may fall; what a step has decided of it
    (PruneReport.vocabulary) is for the caller to carry out (compaction.shed), who goes on with another loop.
    """
    passes = OwnBatches(state, batches, train, plan, precision, distillation, batch_rows, steps, vocabulary)
    while state.step < steps:
        began = time.perf_counter()
        passes.begin()
        pruned = _prune(passes, train, plan) if plan and plan.at_rest else None
        loss = float(passes.own())
        if state.pruner:
            state.pruner.clear_dead()
        norm = gradient_norm(state.model.parameters(), state.ranks)
        healthy = math.isfinite(loss) and math.isfinite(norm)
        state.skipped_steps += not healthy
        state.skipped_in_a_row = 0 if healthy else state.skipped_in_a_row + 1
        if state.skipped_in_a_row >= MOST_SKIPPED:
            raise Diverged(
                f"training has diverged: at step {state.step} the loss is {loss:.4g} and its gradient norm "
                f"{norm:.4g}, not finite for {MOST_SKIPPED} steps in a row"
            )
        prunes = healthy and plan is not None and not plan.at_rest
        if prunes and state.pruner and not state.pruner.finished:
            state.pruner.looks.observe()
        lr = learning_rate(state.tokens, train)
        if healthy and lr:
            update(state.optimizer, state.model.parameters(), lr=lr, clip=train.grad_clip, norm=norm)
        else:
            state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += passes.tokens
        if prunes:
            pruned = _prune(passes, train, plan)
        report, compaction = pruned or (None, None)
        yield StepRecord(loss, lr, norm, time.perf_counter() - began, report, compaction)


def _prune(
    passes: OwnBatches, train: TrainConfig, plan: PruningPlan | None
) -> tuple[PruneReport, Compaction | None] | None:
    """The events that are due, and the compaction after them; None once pruning is over."""
    state = passes.state
    if state.pruner is None or state.pruner.finished:
        return None
    assert plan is not None
    report = passes.prune(state.tokens)
    exactly = report.milestone is not None or state.pruner.finished  # whose shapes are aligned
    live, allocated = state.pruner.widths, state.space.widths
    widths = compaction_widths(live, allocated, plan.feasible, exactly=exactly, frees=plan.compact_at)
    return report, compact(state, widths, train, plan) if widths else None


def check_finite(state: TrainState) -> None:
    """Raises Diverged, on every rank, where a weight of any of them is not finite: such weights are not to be saved.

    A finite gradient may do that to them, and nothing says so before the next step's loss.
    """
    fine = torch.stack([local(weight.detach()).isfinite().all() for weight in state.model.parameters()]).all()
    if state.ranks.largest(int(not fine)):
        raise Diverged(f"training has diverged: after step {state.step} some weights are not finite")
