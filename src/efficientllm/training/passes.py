"""Passes over a model in training, whoever's loop it is: a gradient, and the inputs and gates that pruning asks for;
and how many rows our own read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.decision import ByDamage, Standing
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Space
from efficientllm.pruning.readers import read_tensors
from efficientllm.training.gradient import SummedLoss, has_planes, predicted_tokens
from efficientllm.training.hooks import Inputs, Watch, watched_gates
from efficientllm.training.state import PruningPlan, TrainState

Use = Literal["step", "gradient", "text", "inputs"]  # of a pass: what it is made for
LOOK_SHARE, LOOK_TOKENS = 4, 512  # a look reads a quarter of a batch, and no fewer tokens
CORRECTION_TOKENS = 8  # for each input of the widest layer: fewer would be fitted rather than learnt from
CAPTURED = 1 << 31  # input elements that all layers together may keep of a pass


def rows_by_use(plan: PruningPlan | None, rows: int, length: int, processes: int = 1) -> dict[Use, int]:
    """Rows of a pass, over all processes: of a step's own gradient, a whole batch (rows, length); of a gradient to look
    at, of text to encode anew (training/vocabulary.py), and of a pass for inputs of linear layers, which correction
    wants. A look has a row for every process."""
    if plan is None:
        return {"step": rows}

    def within(tokens: int) -> int:
        return min(rows, max(processes, -(-tokens // length)))

    return {
        "step": rows,
        "gradient": within(max(rows * length // LOOK_SHARE, LOOK_TOKENS)),
        "text": within(min(max(rows * length // 8, LOOK_TOKENS), 8192)),
        "inputs": within(correction_tokens(plan.feasible.space)),
    }


def passes_over(rows: Mapping[Use, int], use: Use, batches: int) -> int:
    """How many passes read so many batches; 1 at least, and no more than looks at the gradient would take: of a
    large batch a pass for inputs reads a small part. rows: of each pass, as of rows_by_use."""
    return max(1, min(LOOK_SHARE * batches, -(-batches * rows["step"] // rows[use])))


def kept_every(rows: int, wanted: int) -> int:
    """Of a pass over so many rows every so-manieth is kept as inputs: about as many as are wanted."""
    return max(1, round(rows / wanted))


def correction_tokens(space: Space) -> int:
    """Tokens whose inputs a correction sees: eight for each input of the widest layer."""
    widest = max(space.axis_length(axis, space.widths) for axis, _, _ in read_tensors(space))
    return max(1, min(CORRECTION_TOKENS * widest, CAPTURED // captured_inputs_of(space)))


def captured_inputs_of(space: Space) -> int:
    """Numbers that are kept of one token: the inputs of all linear layers, those that layers share once."""
    return sum(
        space.axis_length(axis, space.widths) * (space.widths.layers if layered else 1) * space.copies(axis)
        for axis, _, layered in read_tensors(space)
    )


@dataclass(frozen=True)
class Pass:
    """What a pass is made over.

    parts: micro-batches of this process, and whether each counts (micro_batches). loss: of some of these rows, summed
    over what is predicted there; any forward pass where inputs are all that is wanted. predicted: in the rows of all
    processes together. first: of these rows, the one at which this process's begin.
    """

    parts: Sequence[tuple[Tensor, bool]]
    loss: SummedLoss
    predicted: float
    first: int = 0


class Passes(ABC):
    """Answers the engine's questions (pruning.contract.Probe) by passes over the rows of somebody's loop.

    The state's model is asked for anew in every pass: what is kept here would outlive a compaction.
    """

    hooks_are_seen = True  # by the pass of a gradient: compiled blocks do not see them

    def __init__(self, state: TrainState) -> None:
        self.state, self.device = state, state.device
        self._kept: Inputs | None = None  # of the step's own pass, until they are asked for
        self._gates: GateSums | None = None  # likewise

    @abstractmethod
    def rows(self, use: Use) -> Pass:
        """The next rows for a pass, which is billed to the run's ledger."""

    @abstractmethod
    def keeping(self, use: Use, names: Sequence[str]) -> AbstractContextManager[Inputs]:
        """Around a pass: keeps what linear layers are given in as many of its rows as are wanted."""

    def backward(self, use: Use, names: Sequence[str], gates: GateSums | None) -> tuple[Tensor, Inputs | None]:
        """Adds the gradient of the rows' mean loss to .grad, a micro-batch at a time; returns that loss, detached, and
        the inputs of the linear layers with these names; None where they could not be seen, or there are none.

        Normalised by all that is predicted, so that micro-batches of unequal size weigh as they should; with several
        processes gradient and loss are means over all of them. gates: takes in those of the rows that count; compiled
        blocks, which do not see the hooks, then run slowly.
        """
        state, ranks, rows = self.state, self.state.ranks, self.rows(use)
        inputs, watches = None, list[Watch]()
        loss, first = torch.zeros((), device=self.device), rows.first
        with ExitStack() as hooks:
            if names and self.hooks_are_seen:
                inputs = hooks.enter_context(self.keeping(use, names))
                watches.append(inputs.taken)
            if gates is not None:
                watches.append(hooks.enter_context(watched_gates(state.model, state.space, gates)))
                hooks.enter_context(nullcontext() if self.hooks_are_seen else torch.compiler.set_stance("force_eager"))
            for place, (part, counts) in enumerate(rows.parts, start=1):
                ranks.beat()  # before the collectives: one that does not come this far is the one that others wait for
                state.runner.last(place == len(rows.parts))
                if gates is not None and has_planes(part):
                    gates.counted = predicted_tokens(part)
                with ExitStack() as counted:
                    for watch in watches if counts else ():
                        counted.enter_context(watch(first))
                    summed = state.runner.run(partial(rows.loss, part))
                mean = summed / (rows.predicted / ranks.world if counts else math.inf)
                mean.backward()
                loss += mean.detach()
                del summed, mean  # with them the graph, before the next forward pass
                first += len(part)
                ranks.beat()
        return ranks.over_batch(loss) / ranks.world if ranks.world > 1 else loss, inputs

    def prune(self, position: float) -> PruneReport:
        """The events that are due at a position of the schedule; what looks have left in .grad is cleared."""
        state = self.state
        assert state.pruner is not None
        report = state.pruner.step(position, self)
        state.flops.add(report.flops)
        if report.events or report.refreshes:
            state.optimizer.zero_grad(set_to_none=True)
        return report

    def vocabulary(self, guide: ByDamage, at: Standing) -> int | None:
        """As of Probe: tokens fall in our own loop alone."""
        return None

    def passes(self, use: Use, batches: int) -> int:
        """As of Probe: with a single batch at hand, one."""
        return 1

    def gates(self) -> GateSums | None:
        """Those of the step's own pass, once; None where it was not watched."""
        own, self._gates = self._gates, None
        return own

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Mapping[str, Tensor]:
        """The gradient at the current weights, in .grad; the inputs on the way, (tokens, inputs) by name."""
        self._kept = None  # what a step has met is older than this
        self.state.optimizer.zero_grad(set_to_none=True)
        _, met = self.backward("gradient", names, gates)
        if met is not None:
            return met
        return self.inputs(names) if names else {}

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Those that the step's own pass has met, once; else of a pass for their sake."""
        kept, self._kept = self._kept, None
        if kept is not None and kept.keys() >= set(names):
            return kept
        state, rows = self.state, self.rows("inputs")
        with self.keeping("inputs", names) as inputs:
            for part, counts in rows.parts:
                with inputs.taken(0) if counts else nullcontext():
                    state.runner.run(partial(rows.loss, part))
        state.ranks.beat()
        return inputs
