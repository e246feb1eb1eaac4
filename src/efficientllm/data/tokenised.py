"""Corpora that are tokens already: an index of their documents in the cache, and rows read from the files themselves.

    index   int64 (3, documents): where each document begins and stops among the tokens of all shards, and the place in
            the stream of rows at which it ends

The stream is what the same documents would be as text: end to end, an EOS after each that has none. Records that all
have one length are a stream that has been cut already: nothing is put between them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from efficientllm.data.rows import Holdout, Part
from efficientllm.data.token_files import Shard
from efficientllm.errors import UsageError

ALIKE = 0.97  # of its tokens a corpus keeps, decoded and encoded again: its own tokenizer 0.999, gpt2 for SmolLM2 0.92
_ALIKE_RECORDS = 8  # that must be of one length before they count as a stream that was cut
_SCANNED = 1 << 24  # tokens looked at in one go
_SAMPLE = 16, 512  # documents, and tokens of each, that are decoded


class TokenRows:
    """Rows of `length` tokens, read from mapped shards by an index (see above). end: the EOS."""

    def __init__(self, shards: Sequence[np.ndarray], index: np.ndarray, length: int, end: int) -> None:
        self._shards, self._length, self._end = list(shards), length, end
        self._starts, self._stops, self._ends = index
        self._bases = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._length if len(self._ends) else 0

    def take(self, index: np.ndarray) -> np.ndarray:
        rows = np.full((len(index), self._length), self._end, dtype=np.int64)
        for row, number in zip(rows, index.tolist(), strict=True):
            self._fill(row, number * self._length)
        return rows

    def marks(self, index: np.ndarray) -> None:
        return None

    def _fill(self, row: np.ndarray, place: int) -> None:
        """Writes the stream from `place` on into a row that is all EOS."""
        document, filled = int(np.searchsorted(self._ends, place, side="right")), 0
        while filled < len(row):
            start, stop, end = int(self._starts[document]), int(self._stops[document]), int(self._ends[document])
            before = int(self._ends[document - 1]) if document else 0
            first = start + place + filled - before
            taken = min(max(0, stop - first), len(row) - filled)
            if taken:
                shard = int(np.searchsorted(self._bases, first, side="right")) - 1
                first -= int(self._bases[shard])
                row[filled : filled + taken] = self._shards[shard][first : first + taken]
            filled = min(len(row), end - place)
            document += 1


def index_of(shards: Sequence[Shard], end: int, *, whole: bool = False) -> np.ndarray:
    """The index of all documents that are not empty. end: the EOS. whole: none has been cut, whatever their lengths."""
    parts, base, stream = [np.zeros((3, 0), np.int64)], 0, 0
    sizes = np.concatenate([np.zeros(0, np.int64), *(shard.stops - shard.starts for shard in shards)])
    cut = not whole and len(sizes) >= _ALIKE_RECORDS and bool((sizes[:-1] == sizes[0]).all() and sizes[-1] <= sizes[0])
    for shard in shards:
        there = shard.stops > shard.starts
        starts, stops = np.asarray(shard.starts[there]), np.asarray(shard.stops[there])
        lacks = np.zeros(len(stops), np.int64) if cut else (shard.tokens[stops - 1] != end).astype(np.int64)
        ends = stream + np.cumsum(stops - starts + lacks)
        parts.append(np.stack([starts + base, stops + base, ends]))
        stream, base = int(ends[-1]) if len(ends) else stream, base + len(shard.tokens)
    return np.concatenate(parts, axis=1)


def check_tokens(shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """The largest token id. Raises UsageError where the tokens are not this tokenizer's: of too narrow a type, out of
    its range, or such that their text is tokenised otherwise."""
    most, largest = max(tokenizer.get_vocab().values(), default=0), 0
    another = "it is of another tokenizer; set `tokenizer` to its own, or tokenise the text anew"
    for shard in shards:
        if np.iinfo(shard.tokens.dtype).max < most:
            raise UsageError(
                f"'{name}' holds {shard.tokens.dtype}, too narrow for the tokenizer's id {most}: {another}"
            )
        for first in range(0, len(shard.tokens), _SCANNED):
            part = shard.tokens[first : first + _SCANNED]
            largest = max(largest, int(part.max()))
            if part.min() < 0 or largest > most:
                wrong = int(part.min()) if part.min() < 0 else largest
                raise UsageError(f"'{name}' holds token id {wrong}, which the tokenizer does not have: {another}")
    alike = _alike(shards, tokenizer)
    if alike < ALIKE:
        raise UsageError(f"'{name}', decoded and tokenised again, keeps {alike:.0%} of its tokens: {another}")
    return largest


def _alike(shards: Sequence[Shard], tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean share of the tokens of some documents that are there again once their text is tokenised anew."""
    number, length = _SAMPLE
    shares, encode = list[float](), cast(Any, tokenizer)
    for shard in shards[:: max(1, len(shards) // number)][:number]:
        whole = np.flatnonzero(shard.stops > shard.starts)
        for at in whole[:: max(1, len(whole) // number)][: max(1, number // len(shards))]:
            ids = shard.tokens[shard.starts[at] : shard.stops[at]][:length].tolist()
            text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            again = encode(text, add_special_tokens=False, verbose=False)["input_ids"]
            shares.append(sum((Counter(ids) & Counter(again)).values()) / max(len(ids), len(again)))
    return sum(shares) / len(shares) if shares else 1.0


def digests_of(shards: Sequence[Shard], index: np.ndarray) -> np.ndarray:
    """Of the tokens of each document of an index without its EOS, whatever keeps them; uint64 (documents,)."""
    digests, base, at, lengths = np.zeros(index.shape[1], np.uint64), 0, 0, np.diff(index[2], prepend=0)
    for shard in shards:
        until = int(np.searchsorted(index[0], base + len(shard.tokens)))
        for place in range(at, until):
            first = index[0, place] - base
            tokens = shard.tokens[first : first + lengths[place] - 1].astype("<i4")
            digests[place] = int.from_bytes(hashlib.sha256(tokens.tobytes()).digest()[:8], "big")
        base, at = base + len(shard.tokens), until
    return digests


def divide(index: np.ndarray, digests: np.ndarray, holdout: Holdout) -> tuple[np.ndarray, np.ndarray]:
    """The index of what is trained on, and of what is held out."""
    if holdout.bound is None:
        return _split(index, int(index[2, -1]) if holdout.position is None else holdout.position)
    lengths, held = np.diff(index[2], prepend=0), digests <= np.uint64(holdout.bound)
    train, validation = (
        np.concatenate([index[:2, chosen], np.cumsum(lengths[chosen])[None]]) for chosen in (~held, held)
    )
    return train, validation


def write_index(index: np.ndarray, file: Path, length: int, largest_id: int) -> Part:
    with file.open("wb") as out:
        np.save(out, index)
    tokens = int(index[2, -1]) if index.shape[1] else 0
    return Part(index.shape[1], tokens, tokens // length, largest_id, file.stat().st_size)


def _split(index: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of the stream before a place, and from it on; a document that lies across it is in both."""
    whole = int(np.searchsorted(index[2], place, side="right"))
    before, after = index[:, :whole], index[:, whole:].copy()
    begun = place - (int(index[2, whole - 1]) if whole else 0)
    if begun and after.shape[1]:
        middle = int(after[0, 0]) + begun
        piece = np.asarray([[after[0, 0]], [min(middle, int(after[1, 0]))], [place]])
        before = np.concatenate([before, piece], axis=1)
        after[0, 0] = min(middle, int(after[1, 0]))
    after[2] -= place
    return before, after
