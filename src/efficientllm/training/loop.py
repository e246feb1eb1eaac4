"""The training loop, top to bottom. It yields after every step; files, bars and validation are its caller's."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from efficientllm.pruning.contract import PruneReport, Shedding
from efficientllm.pruning.shards import local
from efficientllm.pruning.widths import Widths
from efficientllm.training.compaction import compact, compaction_widths
from efficientllm.training.distillation import Distillation
from efficientllm.training.gradient import Precision, gradient_norm, update
from efficientllm.training.looks import Batches
from efficientllm.training.optim import learning_rate
from efficientllm.training.state import PruningPlan, TrainState, prune
from efficientllm.training.step import Step

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig
    from efficientllm.training.vocabulary import Vocabulary


@dataclass(frozen=True)
class Compaction:
    """One change of shape: allocated widths and parameters before and after, and how long it took. vocabulary: its
    rows before and after, where some have gone."""

    before: Widths
    after: Widths
    allocated_before: int
    allocated_after: int
    seconds: float
    vocabulary: tuple[int, int] | None = None


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
    while state.step < steps:
        began = time.perf_counter()
        step = Step(state, batches, train, plan, precision, distillation, batch_rows)
        shedding = (
            partial(vocabulary.choose, state, step) if vocabulary and _spares_a_step(state, plan, steps) else None
        )
        pruned = _prune(state, train, plan, step, shedding) if plan and plan.at_rest else None
        loss = float(step.own())
        if state.pruner:
            state.pruner.clear_dead()
        norm = gradient_norm(state.model.parameters(), state.ranks)
        healthy = _count_health(state, loss, norm)
        prunes = healthy and plan is not None and not plan.at_rest
        if prunes and state.pruner and not state.pruner.finished:
            state.pruner.looks.observe()
        lr = _update_weights(state, train, step.tokens, norm if healthy else None)
        if prunes:
            pruned = _prune(state, train, plan, step, shedding)
        report, compaction = pruned or (None, None)
        yield StepRecord(loss, lr, norm, time.perf_counter() - began, report, compaction)


def _spares_a_step(state: TrainState, plan: PruningPlan | None, steps: int) -> bool:
    """Whether this step may leave all that is due to the ones after it, which reach a milestone each."""
    if state.pruner is None or plan is None:
        return False
    return steps - state.step - 1 >= len(plan.milestones) - state.pruner.milestone


def _prune(
    state: TrainState, train: TrainConfig, plan: PruningPlan | None, step: Step, shedding: Shedding | None
) -> tuple[PruneReport, Compaction | None] | None:
    """The events that are due, and the compaction after them; None once pruning is over."""
    if state.pruner is None or state.pruner.finished:
        return None
    assert plan is not None
    report = prune(state, state.tokens, step, shedding)
    return report, _compact_if_due(state, train, plan, exactly=report.milestone is not None)


def _update_weights(state: TrainState, train: TrainConfig, tokens: int, norm: float | None) -> float:
    """The optimizer's step with the gradient of so many tokens, and its learning rate. The weights stay as they are
    where the gradient is not finite (norm None)."""
    lr = learning_rate(state.tokens, train)
    if lr and norm is not None:
        update(state.optimizer, state.model.parameters(), lr=lr, clip=train.grad_clip, norm=norm)
    else:
        state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += tokens
    return lr


def check_finite(state: TrainState) -> None:
    """Raises Diverged, on every rank, where a weight of any of them is not finite: such weights are not to be saved.

    A finite gradient may do that to them, and nothing says so before the next step's loss.
    """
    fine = torch.stack([local(weight.detach()).isfinite().all() for weight in state.model.parameters()]).all()
    if state.ranks.largest(int(not fine)):
        raise Diverged(f"training has diverged: after step {state.step} some weights are not finite")


def _count_health(state: TrainState, loss: float, norm: float) -> bool:
    """Whether the step can be taken; counts it where not. Raises Diverged where too many could not be."""
    if math.isfinite(loss) and math.isfinite(norm):
        state.skipped_in_a_row = 0
        return True
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= MOST_SKIPPED:
        raise Diverged(
            f"training has diverged: at step {state.step} the loss is {loss:.4g} and its gradient norm {norm:.4g}, not "
            f"finite for {MOST_SKIPPED} steps in a row"
        )
    return False


def _compact_if_due(state: TrainState, train: TrainConfig, plan: PruningPlan, *, exactly: bool) -> Compaction | None:
    """exactly: to the live widths, which a milestone of the ladder has just aligned."""
    widths = compaction_widths(state, plan, exactly=exactly)
    if widths is None:
        return None
    began = time.perf_counter()
    before, allocated = state.space.widths, state.allocated_parameters
    compact(state, widths, train, plan)
    return Compaction(before, widths, allocated, state.allocated_parameters, time.perf_counter() - began)
