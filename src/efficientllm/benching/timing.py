"""One run with its clock and its energy counter around it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from efficientllm.benching.contract import Backend, Sample

Joules = Callable[[], float]  # energy since some moment; it only grows


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
    """Prefill, then `steps` decode steps of `batch` sequences. clock: seconds."""
    read = joules or (lambda: 0.0)
    gc.collect()
    backend.begin(batch)
    try:
        energy = [read()]
        times = [clock()]
        backend.prefill()
        times.append(clock())
        energy.append(read())  # reading a counter is on neither phase's clock
        times.append(clock())
        backend.decode(steps)
        times.append(clock())
        energy.append(read())
    finally:
        backend.end()
    used = (energy[1] - energy[0], energy[2] - energy[1]) if joules else (None, None)
    return Sample(times[1] - times[0], times[3] - times[2], *used)
