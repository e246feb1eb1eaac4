"""Models measured in turn: each in a process of its own, so that its peak memory is its own too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
import transformers

from efficientllm.benching.contract import Backend, Settings
from efficientllm.benching.energy import counter_for
from efficientllm.benching.subjects import Candidate
from efficientllm.benching.timing import Joules, measure, threads, turn
from efficientllm.errors import UsageError
from efficientllm.models.process_memory import memory_in_a_sentence, peak_resident, resident

WARM_UPS = 1  # runs of each batch before the first that counts


def loader(settings: Settings) -> Callable[[str, Settings], Backend]:
    """What loads a model, once the libraries themselves take all the memory that they will."""
    if settings.backend == "llamacpp":
        from efficientllm.benching.llamacpp_backend import LlamaCppBackend

        return LlamaCppBackend
    from efficientllm.benching.transformers_backend import load_backend, rehearse

    rehearse(settings)
    return load_backend


def serve(asked: Connection, source: str, settings: Settings) -> None:
    """What the process of a model does: answers with what counts its energy, then each batch size with a Sample of one
    run, and None with the memory taken. An error that is meant for the user is answered as itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the asking process, which then ends this one
    os.dup2(2, 1)  # what libraries print is none of the page
    transformers.utils.logging.disable_progress_bar()
    with suppress(EOFError, ConnectionError), threads(settings.threads):  # until the asking process has ended
        try:
            answer_all(asked, source, settings)
        except UsageError as error:
            asked.send(error)


def answer_all(asked: Connection, source: str, settings: Settings) -> None:
    """Bytes: resident before the model was loaded, and the most since, in main memory and on the device."""
    joules: Joules | None = None
    about = "llama.cpp does not say which board it computes on"
    if settings.device != "gpu":
        joules, about = counter_for(torch.device(settings.device))
    load, full = loader(settings), "does not fit in the memory of the device"
    before = resident()
    with memory_in_a_sentence(f"{source} {full}", "choose a smaller --dtype"):
        backend = load(source, settings)
    asked.send({"measurable": joules is not None, "about": about})
    while True:
        batch = asked.recv()
        if batch is None:
            asked.send({"before": before, "peak": peak_resident(), "device_peak": backend.device_peak()})
            continue
        what = f"{source} with {batch} sequences of {settings.context} tokens"
        with memory_in_a_sentence(f"{what} {full}", "lower --batch or --prompt"):
            sample = measure(backend, batch, settings.generate - 1, joules)
        asked.send(sample)


class Worker:
    """The process of one model, seen from its parent."""

    def __init__(self, candidate: Candidate, settings: Settings) -> None:
        self._name = candidate.name
        self._line, other = get_context("spawn").Pipe()
        target = (other, candidate.source, settings)
        self.process = get_context("spawn").Process(target=serve, args=target, daemon=True)
        self.process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.join()

    def answer(self) -> Any:
        """Raises UsageError where the process cannot answer, or has died."""
        try:
            answer = self._line.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            cause = "killed by the system, which happens when memory runs out" if code == -9 else f"exit code {code}"
            raise UsageError(
                f"the process that measured {self._name} has died ({cause}); see what it printed above"
            ) from None
        if isinstance(answer, UsageError):
            raise answer
        return answer

    def ask(self, batch: int | None) -> Any:
        with suppress(ConnectionError):  # it has died, and may have said why
            self._line.send(batch)
        return self.answer()


def runs(models: int, settings: Settings) -> int:
    """Runs of a whole measurement, warm-ups included."""
    return models * len(settings.batches) * (WARM_UPS + settings.repeats)


def measure_all(candidates: list[Candidate], settings: Settings, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Of each model {"samples": batch -> one Sample a repeat, "energy", "memory"}.

    Within a repeat every batch goes round the models, beginning with another one each time. advance: called after
    every run. Raises UsageError where a model cannot be loaded or measured.
    """
    with ExitStack() as stack:
        workers: list[Worker] = []
        found: list[dict[str, Any]] = []
        for candidate in candidates:
            workers.append(stack.enter_context(Worker(candidate, settings)))
            samples: dict[int, list[Any]] = {batch: [] for batch in settings.batches}
            found.append({"energy": workers[-1].answer(), "samples": samples})
        for repeat in range(-WARM_UPS, settings.repeats):
            for batch in settings.batches:
                for index in turn(len(workers), repeat):
                    sample = workers[index].ask(batch)
                    if repeat >= 0:
                        found[index]["samples"][batch].append(sample)
                    advance()
        return [each | {"memory": worker.ask(None)} for worker, each in zip(workers, found, strict=True)]
