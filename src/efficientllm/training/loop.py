"""The training loop, top to bottom. It yields after every step; files, bars and validation are its caller's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.parts import body
from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.groups import Space
from efficientllm.pruning.ledger import Ledger
from efficientllm.pruning.shards import local
from efficientllm.pruning.widths import Widths
from efficientllm.training.distillation import Distillation
from efficientllm.training.gradient import (
    Precision,
    SummedLoss,
    accumulate_gradient,
    gradient_norm,
    summed_loss,
    unwatched,
    update,
)
from efficientllm.training.looks import Batches, BatchLooks, is_chunked
from efficientllm.training.optim import learning_rate
from efficientllm.training.state import PruningPlan, TrainState, compact, compaction_widths

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig


@dataclass(frozen=True)
class Compaction:
    """One change of shape: allocated widths and parameters before and after, and how long it took."""

    before: Widths
    after: Widths
    allocated_before: int
    allocated_after: int
    seconds: float


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


def step_flops(space: Space, shape: Sequence[int], train: TrainConfig, distillation: Distillation | None) -> Ledger:
    """Floating-point operations of the gradient of a batch of that shape, (rows, length): the student's and the
    teacher's."""
    rows, length = shape
    own = training_flops(
        forward_flops(space, rows, length),
        gradient_checkpointing=train.gradient_checkpointing,
        chunked=distillation is not None,
    )
    return Ledger(steps=own, teacher=distillation.teacher.flops(rows, length) if distillation else 0)


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
) -> Iterator[StepRecord]:
    """Trains until `steps` optimizer steps are done, pruning as planned; yields after each step.

    Looks of pruning read rows of the batches to come and use up no tokens. Pruning at rest comes before a step, all
    else after one. A step whose loss or gradient is not finite is skipped: its batch is read, weights, moments and
    scores stay as they were, nothing is pruned. Raises Diverged after MOST_SKIPPED of them in a row. batch_rows: of a
    whole batch, where several processes share it.
    """
    device, ranks = next(state.model.parameters()).device, state.ranks
    while state.step < steps:
        began = time.perf_counter()
        part = () if ranks.world == 1 else (ranks.share(batch_rows),)
        batch = batches.batch(state.step, *part).to(device)
        shape = (len(batch) * ranks.world, batch.shape[1])
        looks = BatchLooks(state, batches, train, plan, precision, shape) if plan else None
        pruned = _prune(state, train, plan, looks) if plan and plan.at_rest else None
        loss_of = training_loss(state, precision, distillation, chunked=is_chunked(state, train, shape[1]))
        with looks.captures(state.tokens + math.prod(shape)) if looks else nullcontext(unwatched) as watch:
            loss = accumulate_gradient(loss_of, batch, train.micro_batch, state.run, ranks, watch=watch)
        state.flops.add(step_flops(state.space, shape, train, distillation))
        if state.pruner:
            state.pruner.clear_dead()
        norm = gradient_norm(state.model.parameters(), ranks)
        healthy = _count_health(state, float(loss), norm)
        prunes = healthy and plan is not None and not plan.at_rest
        if prunes and state.pruner:
            state.pruner.observe()
        lr = _take(state, train, plan, math.prod(shape), norm if healthy else None)
        if prunes:
            pruned = _prune(state, train, plan, looks)
        report, compaction = pruned or (None, None)
        yield StepRecord(float(loss), lr, norm, time.perf_counter() - began, report, compaction)


def _prune(
    state: TrainState, train: TrainConfig, plan: PruningPlan | None, looks: BatchLooks | None
) -> tuple[PruneReport, Compaction | None] | None:
    """The events that are due, and the compaction after them; None once pruning is over."""
    if state.pruner is None or state.pruner.finished:
        return None
    assert plan is not None
    assert looks is not None
    report = state.pruner.step(state.tokens, looks)
    state.flops.add(report.flops)
    state.optimizer.zero_grad(set_to_none=True)
    return report, _compact_if_due(state, train, plan, exactly=report.rung is not None)


def _take(state: TrainState, train: TrainConfig, plan: PruningPlan | None, tokens: int, norm: float | None) -> float:
    """The optimizer's step with the gradient of so many tokens, and its learning rate. The weights stay as they are
    where the gradient is not finite (norm None)."""
    share = lr_share(state, plan)
    lr = share * learning_rate(state.tokens, train, state.lowered_tokens if share == 1.0 else 0)
    state.lowered_tokens += tokens if share < 1.0 else 0
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


def training_loss(
    state: TrainState, precision: Precision, distillation: Distillation | None, *, chunked: bool = False
) -> SummedLoss:
    """Next-token cross-entropy, or its mixture with what a teacher says, whose logits are chunked always."""
    if distillation is None:
        return lambda rows: summed_loss(state.model, rows, precision, chunked=chunked)

    def loss(rows: Tensor) -> Tensor:
        model: Any = state.model  # asked for anew: what is kept here would outlive a compaction
        return distillation.summed_loss(body(model), model.get_output_embeddings(), rows, precision)

    return loss


def lr_share(state: TrainState, plan: PruningPlan | None) -> float:
    """Share of the learning rate in this step: that of the plan from where pruning begins until it is over."""
    if plan is None or state.pruner is None or state.pruner.finished or state.tokens < plan.begins:
        return 1.0
    return plan.lr_share


def _compact_if_due(state: TrainState, train: TrainConfig, plan: PruningPlan, *, exactly: bool) -> Compaction | None:
    """exactly: to the live widths, which a rung of the ladder has just aligned."""
    widths = compaction_widths(state, plan, exactly=exactly)
    if widths is None:
        return None
    began = time.perf_counter()
    before, allocated = state.space.widths, state.allocated_parameters
    compact(state, widths, train, plan)
    return Compaction(before, widths, allocated, state.allocated_parameters, time.perf_counter() - began)
