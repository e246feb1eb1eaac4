"""From documents to rows of tokens.

    tokenise      texts -> the tokens of each document, its EOS included, and a digest of its text; in parallel, once
    plan_holdout  which documents or, if need be, which rows are for validation
    cut           all documents end to end, as rows of `length` tokens; one pass, a few MB of memory

Cutting is a phase of its own: a batched map that cuts would lose a partial row in each of its batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Sequence, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from efficientllm.data.documents import pieces

COLUMN = "input_ids"
_DIGEST = "digest"
_GROUP_CHARS = 1 << 20
_BATCH_BYTES = 16 << 20
_PROCESS_BYTES = 4 << 20  # starting a process takes longer than tokenising less than this
_WRITE_TOKENS = 1 << 22


@dataclass(frozen=True)
class Holdout:
    """What is for validation: documents with a digest of at most `bound`, or tokens from `position` on, or nothing."""

    bound: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class Part:
    """What a file of rows holds. tokens counts a last, partial row too, which is not in the file."""

    documents: int
    tokens: int
    rows: int
    largest_id: int
    file_bytes: int


class Encoder:
    """Texts to token ids, without special tokens around them. Pickles into worker processes.

    dtype: uint16 where every id of the tokenizer fits, which halves files and reading; int32 otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        largest = max(tokenizer.get_vocab().values(), default=0)
        self.dtype = np.dtype(np.uint16 if largest < 1 << 16 else np.int32)
        self.end = np.array([tokenizer.eos_token_id], dtype=self.dtype)
        self._tokenizer: Any = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None) is not None
        if self._fast:  # its own method that reckons no offsets takes half the time
            self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self._split_special = bool(getattr(tokenizer, "split_special_tokens", False))

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, (tokens,) of dtype."""
        if self._fast:
            self._tokenizer.encode_special_tokens = self._split_special  # which pickling forgets
            encoded = [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=self.dtype) for ids in encoded]


def _groups(texts: Iterable[pa.Scalar]) -> Iterator[list[tuple[str, int | None]]]:
    """Pieces in groups of bounded size; with the last piece of a document comes the digest of its whole text."""
    group: list[tuple[str, int | None]] = []
    chars = 0
    for text in filter(None, (scalar.as_py() for scalar in texts)):
        rest = len(text)
        for piece in pieces(text):
            rest -= len(piece)
            chars += len(piece)
            digest = None if rest else int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            group.append((piece, digest))
            if chars >= _GROUP_CHARS:
                yield group
                group, chars = [], 0
    if group:
        yield group


def encode(batch: pa.Table, *, encoder: Encoder) -> pa.Table:
    """One column of texts -> `input_ids` (list of ids, with EOS) and `digest` (uint64). Empty texts fall out."""
    values: list[np.ndarray] = [encoder.end[:0]]
    lengths, digests, length = [0], [], 0
    for group in _groups(batch.column(0)):
        for ids, (_, digest) in zip(encoder([piece for piece, _ in group]), group, strict=True):
            values.append(ids)
            length += len(ids)
            if digest is not None:
                values.append(encoder.end)
                lengths.append(length + 1)
                digests.append(digest)
                length = 0
    tokens = pa.ListArray.from_arrays(pa.array(np.cumsum(lengths), type=pa.int32()), pa.array(np.concatenate(values)))
    return pa.table({COLUMN: tokens, _DIGEST: pa.array(digests, type=pa.uint64())})


def tokenise(texts: Dataset, encoder: Encoder, folder: Path, workers: int, name: str) -> Dataset:
    """The tokens of each document as a memory-mapped data set under `folder`. texts: one column of strings.

    Special tokens that stand in a text, such as an EOS between stories, are read as such; none are added inside.
    """
    size = max(1, texts.data.nbytes)
    processes = min(workers, len(texts), math.ceil(size / _PROCESS_BYTES))
    return texts.with_format("arrow").map(
        encode,
        batched=True,
        batch_size=max(1, min(1000, len(texts) * _BATCH_BYTES // size)),
        remove_columns=texts.column_names,
        features=Features({COLUMN: Sequence(Value(encoder.dtype.name)), _DIGEST: Value("uint64")}),
        fn_kwargs={"encoder": encoder},
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(folder / "tokens.arrow"),
        load_from_cache_file=False,
        new_fingerprint="0" * 16,  # never looked up: `folder` is this tokenisation's own
        desc=f"tokenising {name}",
    )


def _documents(tokens: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of (lengths int64, digests uint64, values of all documents end to end), without a copy."""
    for batch in tokens.data.to_batches():
        lists = batch.column(COLUMN)
        offsets = lists.offsets.to_numpy()
        values = lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy()
        yield np.diff(offsets).astype(np.int64), batch.column(_DIGEST).to_numpy(), values


def count_tokens(tokens: Dataset) -> int:
    """Tokens of all documents, their EOS included."""
    return sum(len(values) for _, _, values in _documents(tokens))


def plan_holdout(tokens: Dataset, fraction: float, length: int) -> Holdout | None:
    """Holds out about `fraction` of the documents, at least one and at least a row; None if there are not two rows.

    A document is held out by the digest of its text alone: so equal texts stay together, in all sources, and adding
    documents moves none that are there. Where that takes less than a row, documents follow in the order of their
    digests. Where documents cannot be divided so that both sides fill a row and validation stays the smaller one, as
    with a single document, the last rows are held out instead.
    """
    bound = int(fraction * 2.0**64)
    total = held = 0
    for lengths, digests, _ in _documents(tokens):
        total += int(lengths.sum())
        held += int(lengths[digests <= np.uint64(bound)].sum())
    if held < length:  # few tokens, so that all digests fit in memory
        every = [(digests, lengths) for lengths, digests, _ in _documents(tokens)]
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
    """Writes a stream of tokens as Arrow rows of `length`; what does not fill the last row is left out."""

    def __init__(self, path: Path, length: int, dtype: np.dtype) -> None:
        self._path, self._length = path, length
        self._type = pa.list_(pa.from_numpy_dtype(dtype), length)
        schema = pa.schema({COLUMN: self._type})
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, schema)
        self._waiting: list[np.ndarray] = [np.zeros(0, dtype)]
        self._waiting_tokens = self._documents = self._tokens = self._rows = self._largest_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._file.closed:
            self._writer.close()
            self._file.close()

    def add(self, values: np.ndarray, documents: int) -> None:
        """values: token ids (tokens,) of that many whole or begun documents."""
        if not len(values):
            return
        self._documents += documents
        self._tokens += len(values)
        self._largest_id = max(self._largest_id, int(values.max()))
        self._waiting.append(values)
        self._waiting_tokens += len(values)
        if self._waiting_tokens >= _WRITE_TOKENS:
            self._write()

    def finish(self) -> Part:
        """Writes what is left; call it inside the `with`, once."""
        self._write()
        self._writer.close()
        self._file.close()
        return Part(self._documents, self._tokens, self._rows, self._largest_id, self._path.stat().st_size)

    def _write(self) -> None:
        stream = np.concatenate(self._waiting)
        rows = len(stream) // self._length
        full = rows * self._length
        if rows:
            array = pa.FixedSizeListArray.from_arrays(pa.array(stream[:full]), type=self._type)
            self._writer.write_table(pa.table({COLUMN: array}), max(1, _WRITE_TOKENS // self._length))
        self._rows += rows
        self._waiting = [stream[full:].copy()]
        self._waiting_tokens = len(stream) - full


def cut(tokens: Dataset, holdout: Holdout, length: int, dtype: np.dtype, train: Path, held: Path) -> tuple[Part, Part]:
    """Writes the rows for training and those held out, and says what is in them."""
    with RowWriter(train, length, dtype) as train_rows, RowWriter(held, length, dtype) as held_rows:
        start = 0
        for lengths, digests, values in _documents(tokens):
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
