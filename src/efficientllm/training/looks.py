"""Rows that passes are made over: of a batch, and of those to come that pruning looks at."""

from __future__ import annotations

from typing import Literal

from efficientllm.pruning.groups import Space
from efficientllm.pruning.readers import read_tensors
from efficientllm.training.state import PruningPlan

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
