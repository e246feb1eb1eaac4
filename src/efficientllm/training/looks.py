"""Rows that passes are made over: of a batch, and of those to come that pruning looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from efficientllm.pruning.groups import Space
from efficientllm.pruning.ledger import Ledger
from efficientllm.pruning.readers import read_tensors
from efficientllm.training.gradient import SummedLoss
from efficientllm.training.state import PruningPlan

LOOK_SHARE, LOOK_TOKENS = 4, 512  # a look reads a quarter of a batch, and no fewer tokens
CORRECTION_TOKENS = 8  # for each input of the widest layer: fewer would be fitted rather than learnt from
CAPTURED = 1 << 31  # input elements that all layers together may keep of a pass


class Batches(Protocol):
    def batch(self, step: int, part: slice = slice(None), /) -> Tensor:
        """The batch of a step, or some of its rows, as of gradient.token_ids: a pure function of (seed, step)."""
        ...


@dataclass(frozen=True)
class Pass:
    """What a pass is made over, and what it costs.

    parts: micro-batches of this process, and whether each counts (micro_batches). loss: of some
    of these rows, summed over what is predicted there; any forward pass where inputs are all that is wanted. predicted:
    what is predicted in the rows of all processes, divided by their number. Of the rows, of which this process's begin
    at `first`, every so-manieth is kept as inputs, and of those no more than `limit` tokens. flops, refreshed: of the
    pass, over all processes; refreshed are tokens of looks at the gradient.
    """

    parts: Sequence[tuple[Tensor, bool]]
    loss: SummedLoss
    predicted: float = 1.0
    first: int = 0
    every: int = 1
    limit: int | None = None
    flops: Ledger = field(default_factory=Ledger)
    refreshed: int = 0


@dataclass(frozen=True)
class LookRows:
    """Rows of a batch, over all processes, that a gradient, text to encode anew (training/vocabulary.py) and captured
    inputs are taken from."""

    gradient: int
    text: int
    correction: int

    @classmethod
    def of(cls, plan: PruningPlan, rows: int, length: int, processes: int = 1) -> LookRows:
        """rows, length: of a whole batch. A look has a row for every process."""

        def within(tokens: int) -> int:
            return min(rows, max(processes, -(-tokens // length)))

        text = min(max(rows * length // 8, LOOK_TOKENS), 8192)
        correction = correction_tokens(plan.feasible.space)
        return cls(within(max(rows * length // LOOK_SHARE, LOOK_TOKENS)), within(text), within(correction))

    def every(self, rows: int) -> int:
        """Of a pass over so many rows every so-manieth is kept as inputs: about as many as a correction wants."""
        return max(1, round(rows / self.correction))


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
