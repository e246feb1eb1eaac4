"""The training loop, top to bottom. It yields after every step; files, bars and validation are its caller's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.parts import HEAD_WEIGHT, body
from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.groups import Space, Widths
from efficientllm.pruning.shards import local
from efficientllm.training.capture import captured_inputs
from efficientllm.training.chunked_loss import loss_is_chunked
from efficientllm.training.distillation import Distillation
from efficientllm.training.gradient import (
    Precision,
    SummedLoss,
    accumulate_gradient,
    gradient_norm,
    shared_mean_loss,
    shared_micro_batches,
    summed_loss,
    update,
)
from efficientllm.training.optim import learning_rate
from efficientllm.training.state import PruningPlan, TrainState, compact, compaction_widths

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig

FirstRows = Callable[[int, bool], Tensor]  # of so many rows; whether for calibration


class Batches(Protocol):
    def batch(self, step: int, part: slice = slice(None), /) -> Tensor:
        """The batch of a step, int64 (rows, length), or some of its rows: a pure function of (seed, step)."""
        ...


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


class BatchProbe:
    """Answers the pruner's questions about the current batch (pruning.engine.Probe).

    batch: this process's share. rows_of: this process's share of the first so many rows of the whole batch, or of the
    one on which bundles are measured. Counts of tokens and FLOPs are those of all processes together.
    """

    def __init__(
        self,
        state: TrainState,
        batch: Tensor,
        train: TrainConfig,
        precision: Precision,
        loss_of: SummedLoss,
        *,
        first_rows: FirstRows,
        calibration_rows: int,
        correction_tokens: int,
        flops_of_step: int,
    ) -> None:
        self._state, self._batch, self._train = state, batch, train
        self._precision, self._loss_of, self._first_rows = precision, loss_of, first_rows
        self._calibration_rows, self._flops_of_step = calibration_rows, flops_of_step
        self._correction_rows = max(1, correction_tokens // batch.shape[1])
        self._rows: Tensor | None = None

    def loss(self) -> float:
        """On the calibration's rows, the same at every call."""
        state, rows = self._state, max(self._calibration_rows, self._state.ranks.world)
        if self._rows is None:
            self._rows = self._first_rows(rows, True).to(self._batch.device)
        state.flops += forward_flops(state.space, rows, self._batch.shape[1]).total
        parts = shared_micro_batches(self._rows, rows, self._train.micro_batch, state.ranks)
        chunked = _is_chunked(state, self._train, self._batch)
        return shared_mean_loss(state.model, parts, self._precision, state.run, state.ranks, chunked=chunked)

    def refresh(self) -> None:
        state = self._state
        state.optimizer.zero_grad(set_to_none=True)
        accumulate_gradient(self._loss_of, self._batch, self._train.micro_batch, state.run, state.ranks)
        state.refresh_tokens += self._batch.numel() * state.ranks.world
        state.flops += self._flops_of_step

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """On the batch's first tokens, a micro-batch at a time; the vocabulary's logits only where they are needed."""
        state, length = self._state, self._batch.shape[1]
        model: Any = state.model
        forward = model if HEAD_WEIGHT in names else body(model)
        rows = min(max(self._correction_rows, state.ranks.world), len(self._batch) * state.ranks.world)
        own = self._first_rows(rows, False).to(self._batch.device)
        parts = list(shared_micro_batches(own, rows, self._train.micro_batch, state.ranks))
        eager = torch.compiler.set_stance("force_eager")  # a compiled block does not see the hooks
        with captured_inputs(model, names) as inputs, self._precision.context(), eager:
            for part in (part for part, counts in parts if counts):
                state.run(partial(forward, input_ids=part, use_cache=False))
        with self._precision.context():
            for part in (part for part, counts in parts if not counts):
                state.run(partial(forward, input_ids=part, use_cache=False))
        state.ranks.beat()
        passed = forward_flops(state.space, rows, length)
        state.flops += passed.base if forward is not model else passed.total
        return inputs


def step_flops(space: Space, shape: Sequence[int], train: TrainConfig, distillation: Distillation | None) -> int:
    """Floating-point operations of the gradient of a batch of that shape, (rows, length), teacher included."""
    rows, length = shape
    own = training_flops(
        forward_flops(space, rows, length),
        gradient_checkpointing=train.gradient_checkpointing,
        chunked=distillation is not None,
    )
    return own + (distillation.teacher.flops(rows, length) if distillation else 0)


def train_steps(
    state: TrainState,
    batches: Batches,
    train: TrainConfig,
    plan: PruningPlan | None,
    *,
    steps: int,
    calibration_rows: int,
    precision: Precision,
    batch_rows: int = 0,
    distillation: Distillation | None = None,
) -> Iterator[StepRecord]:
    """Trains until `steps` optimizer steps are done, pruning as planned; yields after each step.

    A step whose loss or gradient is not finite is skipped: its batch is read, weights, moments and scores stay as they
    were, nothing is pruned. Raises Diverged after MOST_SKIPPED of them in a row. batch_rows: of a whole batch, where
    several processes share it.
    """
    device, ranks = next(state.model.parameters()).device, state.ranks
    while state.step < steps:
        began = time.perf_counter()
        part = () if ranks.world == 1 else (ranks.share(batch_rows),)
        batch = batches.batch(state.step, *part).to(device)
        tokens = batch.numel() * ranks.world
        loss_of = training_loss(state, precision, distillation, chunked=_is_chunked(state, train, batch))
        loss = accumulate_gradient(loss_of, batch, train.micro_batch, state.run, ranks)
        flops = ranks.world * step_flops(state.space, batch.shape, train, distillation)
        state.flops += flops
        norm = gradient_norm(state.model.parameters(), ranks)
        healthy = _count_health(state, float(loss), norm)
        if healthy and state.pruner:
            state.pruner.observe()
        lr = _take(state, train, plan, tokens, norm if healthy else None)
        report = None
        if healthy and state.pruner and not state.pruner.finished:
            assert plan is not None
            probe = BatchProbe(
                state,
                batch,
                train,
                precision,
                loss_of,
                first_rows=partial(_first_rows, state, batch, batches, plan),
                calibration_rows=calibration_rows,
                correction_tokens=plan.correction_tokens,
                flops_of_step=flops,
            )
            report = state.pruner.step(state.tokens, probe)
            state.flops += report.flops
            state.optimizer.zero_grad(set_to_none=True)
        landed = report is not None and report.rung is not None
        compaction = _compact_if_due(state, train, plan, exactly=landed)
        yield StepRecord(float(loss), lr, norm, time.perf_counter() - began, report, compaction)


def _take(state: TrainState, train: TrainConfig, plan: PruningPlan | None, tokens: int, norm: float | None) -> float:
    """The optimizer's step with the gradient of so many tokens, and its learning rate. The weights stay as they are
    where they are at rest, and where the gradient is not finite (norm None)."""
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


def _first_rows(
    state: TrainState, batch: Tensor, batches: Batches, plan: PruningPlan, rows: int, calibration: bool
) -> Tensor:
    """This process's share of the first rows of the step's batch, or for calibration of the one that the plan wants.

    batch: what this process has of the step's. The state counts the step as done, so its number is the next one's.
    """
    following = calibration and plan.calibrate_on_next
    if state.ranks.world == 1:
        return (batches.batch(state.step) if following else batch)[:rows]
    return batches.batch(state.step - (not following), state.ranks.share(rows))


def _is_chunked(state: TrainState, train: TrainConfig, batch: Tensor) -> bool:
    """What train.loss means for micro-batches of a batch (rows, length) on its device."""
    return loss_is_chunked(train, batch.shape[1], batch.device.type, state.model.config.vocab_size)


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
    """Share of the learning rate in this step: post-training modes leave the weights at rest until pruning is over."""
    if plan is None or state.pruner is None or state.pruner.finished or state.tokens < plan.begins:
        return 1.0
    return plan.lr_share


def _compact_if_due(
    state: TrainState, train: TrainConfig, plan: PruningPlan | None, *, exactly: bool
) -> Compaction | None:
    """exactly: to the live widths, which a rung of the ladder has just aligned."""
    widths = compaction_widths(state, plan, exactly=exactly) if plan else None
    if plan is None or widths is None:
        return None
    began = time.perf_counter()
    before, allocated = state.space.widths, state.allocated_parameters
    compact(state, widths, train, plan)
    return Compaction(before, widths, allocated, state.allocated_parameters, time.perf_counter() - began)
