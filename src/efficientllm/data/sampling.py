"""The batch at step t is a pure function of (seed, t): no state to save, whatever the number of ranks.

sample number  g = step * batch_rows + position in the batch
source         blocks of BLOCK samples hold an exact quota of each source, in an order shuffled by (seed, block)
occurrence     the g-th sample is the j-th of its source: whole blocks before, plus those before it in its block
row            epoch j // rows, and the keyed permutation of range(rows) of that epoch at j % rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024
_ROUNDS = 6
_WORD = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RowSource(Protocol):
    """What gives rows by their number: a corpus."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Tensor:
        """Rows by index, int64 (len(indices), sequence_length) or with planes (data/planes.py), one number of them."""
        ...


def permute(index: np.ndarray, size: int, key: int | np.ndarray) -> np.ndarray:
    """The keyed pseudo-random permutation of range(size) at `index`, elementwise; O(1) memory in `size`.

    A Feistel network is a bijection whatever its round function is: it splits a number of 2b bits into halves and
    replaces (left, right) by (right, left ^ f(right)), which can be undone. 2b is the least even number of bits that
    holds `size`. Where the network leads out of range(size) it is applied again until it leads back in (cycle
    walking): the walk along a cycle of the network ends at the latest where it began, so what is left is a bijection
    of range(size). The network's domain is at most four times `size`, so few walks are long.

    index: int64, any shape, in range(size); key: 64 bits, one for all or an array like `index`, one for each.
    Returns int64 like `index`. Raises ValueError for an index outside.
    """
    index = np.asarray(index, dtype=np.int64)
    if index.size and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"index outside range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = index.reshape(-1).astype(np.uint64)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape).reshape(-1)
    outside = np.arange(len(values))
    while outside.size:
        values[outside] = _feistel(values[outside], half, keys[outside])
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(index.shape)


def derive(*parts: int | np.ndarray) -> np.ndarray:
    """Keys of 64 bits from integers, each of which changes all of it (a chain of splitmix64); uint64, broadcast."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = np.uint64(part & _WORD) if isinstance(part, int) else part.astype(np.uint64)
        key = _scramble(key + word + _GOLDEN)
    return key


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """Bijection of range(4 ** half), uint64; a key for each value."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for turn in range(1, _ROUNDS + 1):
        round_keys = keys + np.uint64(turn * int(_GOLDEN) & _WORD)
        left, right = right, left ^ (_scramble(right ^ round_keys) & mask)
    return (left << shift) | right


def _scramble(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; uint64 arrays, arithmetic modulo 2 ** 64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def quotas(weights: Sequence[float], block: int = BLOCK) -> list[int]:
    """Samples of each source in a block, by largest remainder; they sum to `block`. Ties go to the earlier source.

    Raises ValueError for a weight that is not positive, or so small that its source would never be read.
    """
    if not weights:
        raise ValueError("no source to read from: name at least one")
    for number, weight in enumerate(weights, start=1):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight} of source {number} is not a positive number: mend it or drop the source")
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) * block / total for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: (counts[source] - shares[source], source))
    for source in by_remainder[: block - sum(counts)]:
        counts[source] += 1
    for number, (weight, count) in enumerate(zip(weights, counts, strict=True), start=1):
        if not count:
            raise ValueError(
                f"weight {weight} of source {number} is under 1/{block} of all weights together, so it would never be "
                "read: raise it, or drop the source"
            )
    return counts


class BatchStream:
    """Batches of rows from several sources, mixed by weight.

    A row comes again only once its source has been read to the end, each time in another order, and every block of
    BLOCK samples holds the exact quota of each source.
    """

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float], batch_rows: int, seed: int) -> None:
        """weights: relative, one per source. Raises ValueError, with the mend, for an input that cannot be sampled."""
        if len(weights) != len(sources):
            raise ValueError(f"{len(sources)} sources but {len(weights)} weights: give one weight per source")
        if batch_rows < 1:
            raise ValueError(f"a batch of {batch_rows} rows is empty: set at least one row")
        for number, source in enumerate(sources, start=1):
            if not len(source):
                raise ValueError(f"source {number} has no rows: add text, or drop the source")
        self._sources = list(sources)
        self._sizes = [len(source) for source in sources]
        self._quotas = quotas(weights)
        self._labels = np.repeat(np.arange(len(sources)), self._quotas)
        self._batch_rows = batch_rows
        self._seed = seed

    def batch(self, step: int, part: slice = slice(None)) -> Tensor:
        """The rows of a step, int64 (batch_rows, sequence_length) or with planes, or only a `part` of them, such as one
        rank's."""
        labels, rows = self._samples(step, part)
        batch: Tensor | None = None
        for source in np.unique(labels):
            where = np.flatnonzero(labels == source)
            taken = self._sources[source].take(rows[where].tolist())
            if batch is None:
                batch = taken.new_empty((len(labels), *taken.shape[1:]))
            batch[torch.from_numpy(where)] = taken
        if batch is None:
            raise ValueError(f"{part} holds none of the {self._batch_rows} rows of a batch")
        return batch

    def rows(self, step: int) -> list[tuple[int, int]]:
        """(source, row) of each row of a step's batch."""
        labels, rows = self._samples(step, slice(None))
        return list(zip(labels.tolist(), rows.tolist(), strict=True))

    def epochs(self, step: int) -> list[float]:
        """Passes over each source in the first `step` batches."""
        block, inside = divmod(step * self._batch_rows, BLOCK)
        begun = np.bincount(self._block(block)[:inside], minlength=len(self._sources))
        return [
            (block * quota + int(extra)) / size
            for quota, extra, size in zip(self._quotas, begun, self._sizes, strict=True)
        ]

    def _block(self, block: int) -> np.ndarray:
        """The source of each sample of a block, int64 (BLOCK,)."""
        return self._labels[permute(np.arange(BLOCK), BLOCK, derive(self._seed, 0, block))]

    def _samples(self, step: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Source and row of each sample of a part of a batch, int64 (samples,) each."""
        if step < 0:
            raise ValueError(f"step {step} is before the first, 0")
        samples = step * self._batch_rows + np.arange(self._batch_rows)[part]
        labels = np.empty_like(samples)
        occurrences = np.empty_like(samples)
        blocks = samples // BLOCK
        for block in np.unique(blocks).tolist():
            here = blocks == block
            inside = samples[here] - block * BLOCK
            order = self._block(block)
            labels[here] = order[inside]
            for source in np.unique(order[inside]):
                mine = here & (labels == source)
                before = np.cumsum(order == source) - 1
                occurrences[mine] = block * self._quotas[source] + before[samples[mine] - block * BLOCK]
        rows = np.empty_like(samples)
        for source in np.unique(labels).tolist():
            mine = labels == source
            rows[mine] = self._rows_of(source, occurrences[mine])
        return labels, rows

    def _rows_of(self, source: int, occurrences: np.ndarray) -> np.ndarray:
        """The rows that a source gives at its j-th samples, int64."""
        size = self._sizes[source]
        epochs, places = np.divmod(occurrences, size)
        return permute(places, size, derive(self._seed, 1, source, epochs))
