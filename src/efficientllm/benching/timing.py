"""One run with its clock and its energy counter around it, and whose turn it is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from efficientllm.benching.contract import Backend, Sample

Joules = Callable[[], float]  # energy since some moment; it only grows


def turn(models: int, repeat: int) -> list[int]:
    """The order of the models within a repeat: each repeat begins with the next one, so that none is always first."""
    return [(repeat + offset) % models for offset in range(models)]


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
    joules: Joules | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Prefill, then `steps` decode steps of `batch` sequences. clock: seconds; no counter is read on it."""
    read = joules or (lambda: 0.0)
    gc.collect()
    backend.begin(batch)
    try:
        energy, times = [read()], [clock()]
        backend.prefill()
        times.append(clock())
        energy.append(read())
        times.append(clock())
        backend.decode(steps)
        times.append(clock())
        energy.append(read())
    finally:
        backend.end()
    used = (energy[1] - energy[0], energy[2] - energy[1]) if joules else (None, None)
    return Sample(times[1] - times[0], times[3] - times[2], *used)
