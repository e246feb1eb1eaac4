"""Models measured in turn: each in a process of its own, so that its peak memory is its own too."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, get_context, parent_process
from typing import Any

import torch
import transformers

from efficientllm.benching.settings import Settings
from efficientllm.benching.subjects import BenchModel
from efficientllm.errors import UsageError
from efficientllm.models.process_memory import memory_in_a_sentence, peak_resident, resident
from efficientllm.reporting.progress import tracked

WARM_UPS = 1  # runs of each batch before the first that counts
FULL = "does not fit in the memory of the device"
Timing = dict[str, float]  # prefill_seconds of the prompts, decode_seconds of all decode steps


def turn(models: int, repeat: int) -> list[int]:
    """The order of the models within a repeat: each repeat begins with the next one, so that none is always first."""
    return [(repeat + offset) % models for offset in range(models)]


def measure(backend: Any, batch: int, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """One run. clock: seconds.

    backend: its `run(batch)` yields thrice, the device having finished: the prompts when they are ready, the first
    token of each sequence after the prefill, the last ones after all decode steps. An end of text does not end a run.
    """
    gc.collect()
    ready, first, last = [clock() for _ in backend.run(batch)]
    return {"prefill_seconds": first - ready, "decode_seconds": last - first}


class Measured:
    """A loaded model in the process that measures it."""

    def __init__(self, source: str, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.source, self.settings = source, settings
        load = loader(settings)
        self.before = resident()
        with memory_in_a_sentence(f"{source} {FULL}", "choose a smaller --dtype"):
            self.backend = load(source, settings)

    def run(self, batch: int) -> tuple[Timing, dict[str, int | None]]:
        """And bytes: resident before the model was loaded, and the most since, in main memory and of the GPU."""
        device, what = self.settings.device, f"{self.source} with {batch} sequences of {self.settings.context} tokens"
        with memory_in_a_sentence(f"{what} {FULL}", "lower --batch or --prompt"):
            sample = measure(self.backend, batch)
        taken = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None
        return sample, {"before": self.before, "peak": peak_resident(), "device_peak": taken}


def loader(settings: Settings) -> Callable[[str, Settings], Any]:
    """What loads a model, once the libraries themselves take all the memory that they will."""
    if settings.backend == "llamacpp":
        from efficientllm.benching.llamacpp_backend import LlamaCppBackend

        return LlamaCppBackend
    from efficientllm.benching.transformers_backend import load_backend, rehearse

    rehearse(settings)
    return load_backend


def measure_all(subjects: list[BenchModel], settings: Settings) -> list[dict[str, Any]]:
    """Of each model {"samples": batch -> one Timing a repeat, "memory"}.

    Within a repeat every batch goes round the models, beginning with another one each time. Raises UsageError where a
    model cannot be loaded or measured.
    """
    runs = [
        (repeat, batch, index)
        for repeat in range(-WARM_UPS, settings.repeats)
        for batch in settings.batches
        for index in turn(len(subjects), repeat)
    ]
    with ExitStack() as stack:
        calls = [stack.enter_context(process_of(subject.name)) for subject in subjects]
        for call, subject in zip(calls, subjects, strict=True):
            call(_load, subject.source, settings)
        found: list[dict[str, Any]] = [{"samples": {batch: [] for batch in settings.batches}} for _ in subjects]
        for repeat, batch, index in stack.enter_context(tracked("bench", runs)):
            sample, found[index]["memory"] = calls[index](_run, batch)
            if repeat >= 0:
                found[index]["samples"][batch].append(sample)
    return found


@contextmanager
def process_of(name: str) -> Iterator[Callable[..., Any]]:
    """A function that calls another one in a process of its own, which is killed in the end. It raises UsageError where
    that process has died."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_quiet) as pool:
        others = active_children()
        pool.submit(os.getpid)  # starts it
        (child,) = (each for each in active_children() if each not in others)

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(function, *arguments).result()
            except BrokenProcessPool:
                pool.shutdown()  # once that is done, the exit code is known
                how = _died(child.exitcode or 0)
                raise UsageError(f"the process that measured {name} has died{how}; see what it printed above") from None

        try:
            call(os.getpid)
            yield call
        finally:
            child.kill()


def _died(code: int) -> str:
    """How, by multiprocessing's exit code."""
    if code == -signal.SIGKILL:
        return ", which the system does to it when memory runs out"
    return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"


def _end_with_parent() -> None:
    """Its queue would not end a process whose asking process was killed: both of the queue's ends are open here."""
    asking = parent_process()
    assert asking is not None
    asking.join()
    os._exit(1)


def _quiet() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the asking process, which then kills this one
    os.dup2(2, 1)  # what libraries print is none of the page
    transformers.utils.logging.disable_progress_bar()


_here: list[Measured] = []  # in the process that measures it


def _load(source: str, settings: Settings) -> None:
    _here.append(Measured(source, settings))


def _run(batch: int) -> tuple[Timing, dict[str, int | None]]:
    return _here[0].run(batch)
