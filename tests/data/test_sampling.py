"""Batches are a pure function of (seed, step); rows, epochs and shares of sources are exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientllm.data.sampling import BLOCK, BatchStream, permute, quotas


class Numbered:
    """Row r of source s reads [s, r, 0]."""

    def __init__(self, source: int, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return self.size

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[self.source, index, 0] for index in indices])


def stream(sizes: Sequence[int], weights: Sequence[float], batch_rows: int, seed: int = 0) -> BatchStream:
    return BatchStream([Numbered(*pair) for pair in enumerate(sizes)], weights, batch_rows, seed)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(size=st.integers(2**33, 2**50), key=st.integers(0, 2**64 - 1), index=st.integers(0, 2**33 - 1))
def test_permute_needs_no_memory_and_gives_one_index_what_it_gives_many(size: int, key: int, index: int) -> None:
    alone = permute(np.array(index), size, key)
    assert 0 <= alone < size
    assert alone == permute(np.array([[index], [0]]), size, np.array([[key], [5]], dtype=np.uint64))[0, 0]


def test_permute_looks_random() -> None:
    """Over keys, every index goes everywhere about equally often, and neighbours do not stay together."""
    size, keys = 7, 7000
    images = permute(np.tile(np.arange(size), (keys, 1)), size, np.arange(keys)[:, None])
    for index in range(size):
        counts = np.bincount(images[:, index], minlength=size)
        assert abs(counts - keys / size).max() < 5 * (keys / size) ** 0.5
    order = permute(np.arange(10_001), 10_001, 1)
    assert abs(np.corrcoef(np.arange(10_001), order)[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 10


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_batches_do_not_depend_on_what_was_read_before(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    weights = [data.draw(st.floats(0.1, 10)) for _ in sizes]
    batch_rows = data.draw(st.integers(1, 1500))
    seed = data.draw(st.integers(-(2**40), 2**64))
    steps = data.draw(st.lists(st.integers(0, 30), min_size=2, max_size=4))
    once = stream(sizes, weights, batch_rows, seed)
    there = {step: once.batch(step) for step in steps}
    for step in reversed(steps):
        fresh = stream(sizes, weights, batch_rows, seed)
        assert torch.equal(fresh.batch(step), there[step])
        assert fresh.rows(step) == [tuple(row) for row in there[step][:, :2].tolist()]
        parts = [fresh.batch(step, slice(rank, None, 3)) for rank in range(min(3, batch_rows))]
        assert torch.equal(torch.cat(parts), torch.cat([there[step][rank::3] for rank in range(len(parts))]))


def test_the_batch_size_does_not_change_the_order_of_samples() -> None:
    whole = stream([700, 50], [3, 1], 1500).rows(0)
    small = stream([700, 50], [3, 1], 30)
    assert [row for step in range(50) for row in small.rows(step)] == whole


@pytest.mark.parametrize(("sizes", "weights"), [([333], [1.0]), ([700, 90, 2000], [0.7, 0.2, 0.1])])
def test_each_epoch_reads_every_row_once_and_in_another_order(sizes: list[int], weights: list[float]) -> None:
    samples = [row for step in range(80) for row in stream(sizes, weights, 64, seed=3).rows(step)]
    for source, size in enumerate(sizes):
        mine = [row for label, row in samples if label == source]
        epochs = [mine[first : first + size] for first in range(0, len(mine), size)]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_another_seed_is_another_order() -> None:
    assert stream([500, 500], [1, 1], 64, seed=0).rows(0) != stream([500, 500], [1, 1], 64, seed=1).rows(0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.2, 20), min_size=1, max_size=9))
def test_every_block_holds_the_exact_quotas(weights: list[float]) -> None:
    expected = quotas(weights)
    assert sum(expected) == BLOCK
    for weight, count in zip(weights, expected, strict=True):
        assert abs(count - weight / sum(weights) * BLOCK) < 1
    batches = stream([5] * len(weights), weights, BLOCK)
    first, second = batches.rows(0), batches.rows(7)
    for block in (first, second):
        counts = Counter(label for label, _ in block)
        assert [counts[source] for source in range(len(weights))] == expected
    if len(weights) > 1:
        assert [label for label, _ in first] != [label for label, _ in second]


def test_epochs_count_what_was_read() -> None:
    batches = stream([700, 90, 2000], [0.7, 0.2, 0.1], 100)
    read: Counter[int] = Counter()
    for step in range(40):
        assert batches.epochs(step) == [read[source] / size for source, size in enumerate([700, 90, 2000])]
        read.update(label for label, _ in batches.rows(step))


@pytest.mark.parametrize(
    ("sizes", "weights", "rows", "message"),
    [
        ([5, 5], [1.0, 1e-4], 4, "weight 0.0001 of source 2 is under 1/1024 of all weights together"),
        ([5, 5], [1.0, 0.0], 4, "weight 0.0 of source 2 is not a positive number"),
        ([5, 5], [1.0, float("nan")], 4, "weight nan of source 2 is not a positive number"),
        ([5, 5], [1.0], 4, "2 sources but 1 weights"),
        ([5, 0], [1.0, 1.0], 4, "source 2 has no rows"),
        ([], [], 4, "no source to read from"),
        ([5], [1.0], 0, "a batch of 0 rows is empty"),
    ],
)
def test_what_cannot_be_sampled_is_refused(sizes: list[int], weights: list[float], rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(sizes, weights, rows)
