"""Models measured in turn: each in a process of its own, so that its peak memory is its own too."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
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
Run = Callable[[int], tuple[Timing, dict[str, int | None]]]  # a batch -> one run of it, and `memory` of the process


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


def loaded(source: str, settings: Settings) -> Run:
    """Loads a model in this process, and returns what measures it. Memory is in bytes: resident `before` the model was
    loaded, but with all that its libraries take; the `peak` since, and the `device_peak` of a GPU."""
    torch.set_num_threads(settings.threads)
    load, cuda = _loader(settings), settings.device.startswith("cuda")
    before = resident()
    with memory_in_a_sentence(f"{source} {FULL}", "choose a smaller --dtype"):
        backend = load(source, settings)

    def run(batch: int) -> tuple[Timing, dict[str, int | None]]:
        what = f"{source} with {batch} sequences of {settings.context} tokens"
        with memory_in_a_sentence(f"{what} {FULL}", "lower --batch or --prompt"):
            sample = measure(backend, batch)
        taken = torch.cuda.max_memory_allocated(settings.device) if cuda else None
        return sample, {"before": before, "peak": peak_resident(), "device_peak": taken}

    return run


def _loader(settings: Settings) -> Callable[[str, Settings], Any]:
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
    turns = [
        (repeat, batch, index)
        for repeat in range(-WARM_UPS, settings.repeats)
        for batch in settings.batches
        for index in turn(len(subjects), repeat)
    ]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(process_of(name, partial(loaded, source, settings))) for name, source, _ in subjects
        ]
        found: list[dict[str, Any]] = [{"samples": {batch: [] for batch in settings.batches}} for _ in subjects]
        for repeat, batch, index in stack.enter_context(tracked("bench", turns)):
            sample, found[index]["memory"] = runs[index](batch)
            if repeat >= 0:
                found[index]["samples"][batch].append(sample)
    return found


@contextmanager
def process_of(name: str, load: Callable[[], Run]) -> Iterator[Run]:
    """The `load()` of a process of its own, which is killed in the end. UsageErrors there are raised here, and one
    where the process has died."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, load))
    process.start()
    there.close()  # else its end would not be seen here

    def answer(*batch: int) -> Any:
        try:
            for each in batch:
                here.send(each)
            found = here.recv()
        except (EOFError, OSError):  # the pipe's other end is gone, perhaps since before it was asked
            process.join()
            how = _died(process.exitcode or 0)
            raise UsageError(f"the process that measured {name} has died{how}; see what it printed above") from None
        if isinstance(found, UsageError):
            raise found
        return found

    try:
        answer()  # that it is loaded
        yield answer
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, load: Callable[[], Run]) -> None:
    """In the process: says when the model is loaded, then measures every batch that it is sent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the asking process, which then kills this one
    os.dup2(2, 1)  # what libraries print is none of the page
    transformers.utils.logging.disable_progress_bar()
    try:
        run = load()
        pipe.send(None)
        while True:
            pipe.send(run(pipe.recv()))
    except UsageError as error:
        pipe.send(error)


def _end_with_parent() -> None:
    """A model that is being loaded or measured would else stay to the end of that."""
    asking = parent_process()
    assert asking is not None
    asking.join()
    os._exit(1)


def _died(code: int) -> str:
    """How, by multiprocessing's exit code."""
    if code == -signal.SIGKILL:
        return ", which the system does to it when memory runs out"
    return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
