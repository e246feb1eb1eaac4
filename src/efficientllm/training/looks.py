"""Looks at a run while it trains: what pruning asks of the loop, answered on rows of the batches to come.

A batch is a pure function of its step, so that rows which training has not seen yet can be read ahead of it, and no row
is skipped by that. Looks are plain next-token loss: a teacher is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.parts import body
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Space
from efficientllm.pruning.saliency import reader_specs
from efficientllm.training.capture import Inputs, captured_inputs, watched_gates
from efficientllm.training.chunked_loss import loss_is_chunked
from efficientllm.training.gradient import (
    Precision,
    Watch,
    accumulate_gradient,
    shared_mean_loss,
    shared_micro_batches,
    summed_loss,
    unwatched,
)
from efficientllm.training.state import PruningPlan, TrainState

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig

LOOK_SHARE, LOOK_TOKENS = 4, 512  # a look reads a quarter of a batch, and no fewer tokens
CORRECTION_TOKENS = 8  # for each input of the widest layer: fewer would be fitted rather than learnt from
CAPTURED = 1 << 31  # input elements that all layers together may keep of a pass


class Batches(Protocol):
    def batch(self, step: int, part: slice = slice(None), /) -> Tensor:
        """The batch of a step, int64 (rows, length), or some of its rows: a pure function of (seed, step)."""
        ...


@dataclass(frozen=True)
class LookRows:
    """Rows of a batch, over all processes, that a gradient, a measured loss and captured inputs are taken from."""

    gradient: int
    measure: int
    correction: int

    @classmethod
    def of(cls, plan: PruningPlan, rows: int, length: int, processes: int = 1) -> LookRows:
        """rows, length: of a whole batch. A look has a row for every process."""

        def within(tokens: int) -> int:
            return min(rows, max(processes, -(-tokens // length)))

        calibration = plan.calibration_tokens or min(max(rows * length // 8, LOOK_TOKENS), 8192)
        correction = correction_tokens(plan.landing.space, plan.correction_tokens)
        return cls(within(max(rows * length // LOOK_SHARE, LOOK_TOKENS)), within(calibration), within(correction))


def correction_tokens(space: Space, wanted: int | None) -> int:
    """Tokens whose inputs a correction sees: as asked, or eight for each input of the widest layer."""
    if wanted is not None:
        return wanted
    widths = {(spec.layer, str(spec.axes[1])): space.shape(spec, space.widths)[1] for spec in reader_specs(space)}
    return max(1, min(CORRECTION_TOKENS * max(widths.values()), CAPTURED // sum(widths.values())))


class BatchLooks:
    """Answers the pruner's questions (pruning.contract.Probe) during one step.

    shape: (rows, length) of a whole batch. Every look reads on where the one before has stopped, from the first batch
    that the state does not count as done. Counts of tokens and FLOPs are those of all processes together.
    """

    def __init__(
        self,
        state: TrainState,
        batches: Batches,
        train: TrainConfig,
        plan: PruningPlan,
        precision: Precision,
        shape: tuple[int, int],
    ) -> None:
        self._state, self._batches, self._train, self._plan = state, batches, train, plan
        self._precision, self._shape = precision, shape
        self._rows = LookRows.of(plan, *shape, state.ranks.world)
        self._read = 0  # rows to come that this step's looks have read
        self._captured: Inputs | None = None  # of the step's own pass
        self._gates: GateSums | None = None

    @contextmanager
    def captures(self, position: int) -> Iterator[Watch]:
        """Around the step's own gradient: keeps the inputs and gates that an event at this position will want to
        see."""
        pruner = self._state.pruner
        due = pruner is not None and not self._plan.at_rest and pruner.due(position)
        names = pruner.reads() if pruner and due else []
        if pruner and due and "gates" in pruner.looks.needs and not self._train.compile:
            self._gates = GateSums(self._state.space, next(self._state.model.parameters()).device)
        with self._capturing(names, self._shape[0], self._gates) as (watch, self._captured):
            yield watch

    def gates(self) -> GateSums | None:
        own, self._gates = self._gates, None
        return own

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Mapping[str, Tensor]:
        state, ranks = self._state, self._state.ranks
        rows, length = self._rows.gradient, self._shape[1]
        own = self._next_rows(rows)
        state.optimizer.zero_grad(set_to_none=True)
        loss_of = partial(summed_loss, state.model, precision=self._precision, chunked=self._chunked)
        with self._capturing(names, rows, gates) as (watch, inputs):
            accumulate_gradient(loss_of, own, self._train.micro_batch, state.run, ranks, rows=rows, watch=watch)
        state.refresh_tokens += rows * length
        again = self._train.gradient_checkpointing
        passed = forward_flops(state.space, rows, length)
        state.flops.looks += training_flops(passed, gradient_checkpointing=again)
        if inputs is None:
            return self.inputs(names) if names else {}
        return inputs

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Those that the step's own pass has met, once; else of a pass over fresh rows, without the LM head."""
        captured, self._captured = self._captured, None
        if captured is not None and captured.keys() >= set(names):
            return captured
        state, ranks, rows = self._state, self._state.ranks, self._rows.correction
        parts = list(shared_micro_batches(self._next_rows(rows), rows, self._train.micro_batch, ranks))
        forward = partial(body(state.model), use_cache=False)
        eager = torch.compiler.set_stance("force_eager")  # a compiled block does not see the hooks
        with captured_inputs(state.model, names, waits=True) as inputs, self._precision.context(), eager:
            for part, counts in parts:
                with inputs.taken(0) if counts else unwatched(0):
                    state.run(partial(forward, input_ids=part))
        ranks.beat()
        flops = forward_flops(state.space, rows, self._shape[1]).base
        if state.pruner and "inputs" in state.pruner.looks.needs:
            state.flops.looks += flops
        else:
            state.flops.correction += flops
        return inputs

    def measure(self) -> Callable[[], float]:
        state, ranks = self._state, self._state.ranks
        rows, length = self._rows.measure, self._shape[1]
        own = self._next_rows(rows)

        def loss() -> float:
            state.flops.calibration += forward_flops(state.space, rows, length).total
            parts = shared_micro_batches(own, rows, self._train.micro_batch, ranks)
            return shared_mean_loss(state.model, parts, self._precision, state.run, ranks, chunked=self._chunked)

        return loss

    @property
    def _chunked(self) -> bool:
        return is_chunked(self._state, self._train, self._shape[1])

    def _next_rows(self, rows: int) -> Tensor:
        """This process's share of so many rows to come, all of one batch."""
        batch = self._shape[0]
        if self._read % batch + rows > batch:
            self._read += batch - self._read % batch
        step, first = divmod(self._read, batch)
        self._read += rows
        share = self._state.ranks.share(rows)
        part = slice(first + share.start, first + share.stop)
        device = next(self._state.model.parameters()).device
        return self._batches.batch(self._state.step + step, part).to(device)

    @contextmanager
    def _capturing(
        self, names: Sequence[str], rows: int, gates: GateSums | None
    ) -> Iterator[tuple[Watch, Inputs | None]]:
        """Hooks for a gradient over so many rows, of which as many are kept as the correction wants, evenly spread.
        Blocks that are compiled do not see them: inputs are then not kept here (a pass for their sake sees more), and
        gates are watched with the blocks run slowly."""
        first, inputs = self._state.ranks.share(rows).start, None
        with ExitStack() as hooks:
            watches: list[Watch] = []
            if names and not self._train.compile:
                every = max(1, rows // self._rows.correction)
                inputs = hooks.enter_context(captured_inputs(self._state.model, names, every=every, waits=True))
                watches.append(lambda row: inputs.taken(first + row))
            if gates is not None:
                watches.append(hooks.enter_context(watched_gates(self._state.model, self._state.space, gates)))
                if self._train.compile:
                    hooks.enter_context(torch.compiler.set_stance("force_eager"))
            yield (partial(_all, watches), inputs)


@contextmanager
def _all(watches: Sequence[Watch], row: int) -> Iterator[None]:
    with ExitStack() as entered:
        for watch in watches:
            entered.enter_context(watch(row))
        yield


def is_chunked(state: TrainState, train: TrainConfig, length: int) -> bool:
    """What train.loss means for micro-batches of rows of that length on the state's device."""
    device = next(state.model.parameters()).device.type
    return loss_is_chunked(train, length, device, state.model.config.vocab_size)
