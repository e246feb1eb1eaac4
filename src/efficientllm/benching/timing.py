"""One run with its clock and its energy counter around it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from efficientllm.benching.contract import Backend, Sample


class Counter(Protocol):
    """Energy since some moment, in joules; it only grows."""

    def joules(self) -> float: ...


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many threads meanwhile, then with as many as before: their number changes the order of
    sums, so a process that goes on to train must not keep another one's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    backend: Backend,
    batch: int,
    steps: int,
    counter: Counter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Prefill, then `steps` decode steps of `batch` sequences. clock: seconds."""

    def energy() -> float | None:
        return None if counter is None else counter.joules()

    gc.collect()
    backend.begin(batch)
    try:
        first_energy, first = energy(), clock()
        backend.prefill()
        second, second_energy = clock(), energy()
        third = clock()
        backend.decode(steps)
        fourth, fourth_energy = clock(), energy()
    finally:
        backend.end()
    return Sample(
        second - first, fourth - third, _rise(first_energy, second_energy), _rise(second_energy, fourth_energy)
    )


def _rise(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
