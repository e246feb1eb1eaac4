"""From documents to rows of tokens.

    plan_holdout  which documents or, if need be, which rows are for validation
    cut           all documents end to end, as rows of `length` tokens; one pass, a few MB of memory

Cutting is a phase of its own: a batched map that cuts would lose a partial row in each of its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

COLUMN, MARKS, DIGEST = "input_ids", "marks", "digest"
CONTEXT, BEGINS = 1, 2  # marks of a token: it is not to be predicted; it is the first of a document
_WRITE_TOKENS = 1 << 22

Documents = Iterator[tuple[np.ndarray, np.ndarray]]  # batches of (lengths int64, digests uint64)


def id_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """Of rows in the cache: uint16 where every id of the tokenizer fits, which halves files; int32 otherwise."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values(), default=0) < 1 << 16 else np.int32)


class Rows(Protocol):
    """Rows of tokens on the disk."""

    def __len__(self) -> int: ...

    def take(self, index: np.ndarray) -> np.ndarray:
        """Rows by index, int64 (len(index), length)."""
        ...

    def marks(self, index: np.ndarray) -> np.ndarray | None:
        """Their tokens' marks, uint8; None where all are to be predicted, and an EOS ends each document."""
        ...


class ArrowRows:
    """Rows in an Arrow file. dataset: columns `input_ids`, fixed-size lists, and `marks` where there are any."""

    def __init__(self, path: Path) -> None:
        self.dataset = Dataset.from_file(str(path))

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, index: np.ndarray) -> np.ndarray:
        return self._taken(COLUMN, index, np.dtype(np.int64))

    def marks(self, index: np.ndarray) -> np.ndarray | None:
        return self._taken(MARKS, index, np.dtype(np.uint8)) if MARKS in self._chunks else None

    def _taken(self, column: str, index: np.ndarray, dtype: np.dtype) -> np.ndarray:
        starts, views = self._chunks[column]
        chunks = np.searchsorted(starts, index, side="right") - 1
        taken = np.empty((len(index), views[0].shape[1]), dtype=dtype)
        for chunk in np.unique(chunks):
            here = chunks == chunk
            taken[here] = views[chunk][index[here] - starts[chunk]]
        return taken

    @cached_property
    def _chunks(self) -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
        """Of each column the first row of each chunk of the file, and the chunks as views (rows, length) of it."""
        found = {}
        for name in self.dataset.column_names:
            column = self.dataset.data.column(name)
            views = [chunk.flatten().to_numpy().reshape(len(chunk), column.type.list_size) for chunk in column.chunks]
            found[name] = np.cumsum([0, *(len(view) for view in views[:-1])]), views
        return found


@dataclass(frozen=True)
class Holdout:
    """What is for validation: documents with a digest of at most `bound`, or tokens from `position` on, or nothing."""

    bound: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class Part:
    """What a file of rows holds. tokens counts a last, partial row too, which is not in the file, and no padding.

    predicted: tokens with loss, of conversations; left_out: conversations longer than a row.
    """

    documents: int
    tokens: int
    rows: int
    largest_id: int
    file_bytes: int
    predicted: int = 0
    left_out: int = 0


def batches_of(tokens: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of (lengths int64, digests uint64, values of all documents end to end), without a copy."""
    for batch in tokens.data.to_batches():
        lists = batch.column(COLUMN)
        offsets = lists.offsets.to_numpy()
        values = lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy()
        yield np.diff(offsets).astype(np.int64), batch.column(DIGEST).to_numpy(), values


def plan_holdout(documents: Callable[[], Documents], fraction: float, length: int) -> Holdout | None:
    """Holds out about `fraction` of the documents, at least one and at least a row; None if there are not two rows.

    A document is held out by the digest of its text alone: so equal texts stay together, in all sources, and adding
    documents moves none that are there. Where that takes less than a row, documents follow in the order of their
    digests. Where documents cannot be divided so that both sides fill a row and validation stays the smaller one, as
    with a single document, the last rows are held out instead.
    """
    bound = int(fraction * 2.0**64)
    total = held = 0
    for lengths, digests in documents():
        total += int(lengths.sum())
        held += int(lengths[digests <= np.uint64(bound)].sum())
    if held < length:  # few tokens, so that all digests fit in memory
        every = [(digests, lengths) for lengths, digests in documents()]
        digests = np.concatenate([np.zeros(0, np.uint64), *(pair[0] for pair in every)])
        lengths = np.concatenate([np.zeros(0, np.int64), *(pair[1] for pair in every)])
        order = np.argsort(digests, kind="stable")
        enough = int(np.searchsorted(np.cumsum(lengths[order]), length))
        if enough < len(order):
            bound = int(digests[order[enough]])
            held = int(lengths[digests <= np.uint64(bound)].sum())
    if length <= held <= total * max(0.5, fraction) and total - held >= length:
        return Holdout(bound=bound)
    rows = total // length
    if rows < 2:
        return None
    return Holdout(position=(rows - min(rows - 1, max(1, round(fraction * rows)))) * length)


class RowWriter:
    """Writes a stream of tokens as Arrow rows of `length`; what does not fill the last row is left out.

    marked: with a mark (uint8) for each token.
    """

    def __init__(self, path: Path, length: int, dtype: np.dtype, *, marked: bool = False) -> None:
        self._path, self._length = path, length
        dtypes = {COLUMN: dtype} | ({MARKS: np.dtype(np.uint8)} if marked else {})
        self._types = {name: pa.list_(pa.from_numpy_dtype(each), length) for name, each in dtypes.items()}
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, pa.schema(self._types))
        self._waiting = {name: [np.zeros(0, each)] for name, each in dtypes.items()}
        self._waiting_tokens = self._documents = self._tokens = self._rows = self._largest_id = self._predicted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._file.closed:
            self._writer.close()
            self._file.close()

    def add(self, values: np.ndarray, documents: int, marks: np.ndarray | None = None, padding: int = 0) -> None:
        """values: token ids (tokens,) of that many whole or begun documents, the last so many of them padding."""
        if not len(values):
            return
        self._documents += documents
        self._tokens += len(values) - padding
        self._largest_id = max(self._largest_id, int(values.max()))
        self._waiting[COLUMN].append(values)
        if marks is not None:
            self._waiting[MARKS].append(marks)
            self._predicted += int((marks & CONTEXT == 0).sum())
        self._waiting_tokens += len(values)
        if self._waiting_tokens >= _WRITE_TOKENS:
            self._write()

    def finish(self) -> Part:
        """Writes what is left; call it inside the `with`, once."""
        self._write()
        self._writer.close()
        self._file.close()
        size = self._path.stat().st_size
        return Part(self._documents, self._tokens, self._rows, self._largest_id, size, self._predicted)

    def _write(self) -> None:
        streams = {name: np.concatenate(waiting) for name, waiting in self._waiting.items()}
        rows = len(streams[COLUMN]) // self._length
        full = rows * self._length
        if rows:
            columns = {
                name: pa.FixedSizeListArray.from_arrays(pa.array(stream[:full]), type=self._types[name])
                for name, stream in streams.items()
            }
            self._writer.write_table(pa.table(columns), max(1, _WRITE_TOKENS // self._length))
        self._rows += rows
        self._waiting = {name: [stream[full:].copy()] for name, stream in streams.items()}
        self._waiting_tokens = len(streams[COLUMN]) - full


def cut(tokens: Dataset, holdout: Holdout, length: int, dtype: np.dtype, train: Path, held: Path) -> tuple[Part, Part]:
    """Writes the rows for training and those held out, and says what is in them."""
    with RowWriter(train, length, dtype) as train_rows, RowWriter(held, length, dtype) as held_rows:
        start = 0
        for lengths, digests, values in batches_of(tokens):
            if holdout.bound is not None:
                mine = digests <= np.uint64(holdout.bound)
                kept = np.repeat(~mine, lengths)
                train_rows.add(values[kept], int((~mine).sum()))
                held_rows.add(values[~kept], int(mine.sum()))
            else:
                position = len(values) if holdout.position is None else max(0, holdout.position - start)
                ends = np.cumsum(lengths)
                train_rows.add(values[:position], int((ends - lengths < position).sum()))
                held_rows.add(values[position:], int((ends > position).sum()))
            start += len(values)
        return train_rows.finish(), held_rows.finish()
