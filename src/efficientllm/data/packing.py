"""Whole conversations in rows: each goes into the fullest of the open rows in which it fits, as in best-fit packing.

What is left of a row is filled with EOS, which is not predicted. No conversation is cut: an answer without its question
would be learnt as one to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from efficientllm.data.rows import BEGINS, CONTEXT, MARKS, Holdout, Part, RowWriter, batches_of

_OPEN = 64  # rows that wait for what fits; more fill rows no better where most conversations are short


@dataclass
class _Row:
    tokens: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)
    filled: int = 0


class _Packer:
    """Packs conversations into rows of `length` and hands these to a writer in the order in which they are full."""

    def __init__(self, writer: RowWriter, length: int, end: int, dtype: np.dtype) -> None:
        self._writer, self._length, self._end, self._dtype = writer, length, end, dtype
        self._open: list[_Row] = []
        self.left_out = 0

    def add(self, tokens: np.ndarray, marks: np.ndarray) -> None:
        """One conversation; without tokens: one that was longer than a row."""
        if not len(tokens):
            self.left_out += 1
            return
        fitting = [row for row in self._open if row.filled + len(tokens) <= self._length]
        if fitting:
            row = max(fitting, key=lambda each: each.filled)  # the first of equals
        else:
            if len(self._open) == _OPEN:
                self._close(max(self._open, key=lambda each: each.filled))
            row = _Row()
            self._open.append(row)
        row.tokens.append(tokens)
        row.marks.append(marks)
        row.filled += len(tokens)
        if row.filled == self._length:
            self._close(row)

    def finish(self) -> Part:
        while self._open:
            self._close(self._open[0])
        return replace(self._writer.finish(), left_out=self.left_out)

    def _close(self, row: _Row) -> None:
        self._open = [each for each in self._open if each is not row]
        room = self._length - row.filled
        marks = np.full(room, CONTEXT, dtype=np.uint8)
        marks[:1] |= BEGINS
        tokens = np.concatenate([*row.tokens, np.full(room, self._end, dtype=self._dtype)])
        self._writer.add(tokens, len(row.tokens), np.concatenate([*row.marks, marks]), padding=room)


def pack(
    chats: Dataset, holdout: Holdout, length: int, dtype: np.dtype, end: int, train: Path, held: Path
) -> tuple[Part, Part]:
    """Writes the rows for training and those held out, and says what is in them. chats: as from encode_chats; holdout:
    by documents; end: the EOS."""
    bound = -1 if holdout.bound is None else holdout.bound
    with (
        RowWriter(train, length, dtype, marked=True) as train_rows,
        RowWriter(held, length, dtype, marked=True) as held_rows,
    ):
        packers = [_Packer(writer, length, end, dtype) for writer in (train_rows, held_rows)]
        for (lengths, digests, values), batch in zip(batches_of(chats), chats.data.to_batches(), strict=True):
            lists = batch.column(MARKS)
            marks = lists.values.slice(lists.offsets[0].as_py(), len(values)).to_numpy()
            stops = np.cumsum(lengths)
            for start, stop, digest in zip(stops - lengths, stops, digests, strict=True):
                packers[int(digest) <= bound].add(values[start:stop], marks[start:stop])
        return packers[0].finish(), packers[1].finish()
