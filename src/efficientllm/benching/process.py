"""Models measured in turn: each in a process of its own, so that its peak memory is its own too.

    python -m efficientllm.benching.process

reads pickled requests of its parent from stdin and answers each on stdout: first a source with its settings, then batch
sizes (one run each), then None (the memory taken). An error that is meant for the user is answered as itself. What
libraries print goes to stderr. Ends with its input.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Self

import torch
import transformers

from efficientllm.benching.contract import Backend, Sample, Settings
from efficientllm.benching.energy import counter_for
from efficientllm.benching.subjects import Candidate
from efficientllm.benching.timing import Joules, measure, threads
from efficientllm.errors import UsageError
from efficientllm.models.process_memory import memory_in_a_sentence, peak_resident, resident

WARM_UPS = 1  # runs of each batch before the first that counts


class Loaded:
    """A model in this process. energy: what counts it, or why nothing does."""

    def __init__(self, source: str, settings: Settings) -> None:
        self._source, self._settings = source, settings
        self._joules, about = counter(settings)
        load = loader(settings)
        self._before = resident()
        with memory_in_a_sentence(f"{source} does not fit in the memory of the device", "choose a smaller --dtype"):
            self._backend = load(source, settings)
        self.energy = {"measurable": self._joules is not None, "about": about}

    def run(self, batch: int) -> Sample:
        what = f"{self._source} with {batch} sequences of {self._settings.context} tokens"
        with memory_in_a_sentence(f"{what} does not fit in the memory of the device", "lower --batch or --prompt"):
            return measure(self._backend, batch, self._settings.generate - 1, self._joules)

    def memory(self) -> dict[str, int | None]:
        """Bytes: resident before the model was loaded, and the most since, in main memory and on the device."""
        return {"before": self._before, "peak": peak_resident(), "device_peak": self._backend.device_peak()}


def loader(settings: Settings) -> Callable[[str, Settings], Backend]:
    """What loads a model, once the libraries themselves take all the memory that they will."""
    if settings.backend == "llamacpp":
        from efficientllm.benching.llamacpp_backend import LlamaCppBackend

        return LlamaCppBackend
    from efficientllm.benching.transformers_backend import TransformersBackend, rehearse

    rehearse(settings)
    return TransformersBackend


def counter(settings: Settings) -> tuple[Joules | None, str]:
    if settings.device == "gpu":
        return None, "llama.cpp does not say which board it computes on"
    return counter_for(torch.device(settings.device))


class Worker:
    """The process of one model, seen from its parent."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._name = name
        # A session of its own: Ctrl-C reaches the asking process alone, which then ends this one.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "efficientllm.benching.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(settings.threads)},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):  # what was written to a process that has died
            self._process.communicate()

    def ask(self, request: Any) -> Any:
        """Raises UsageError where the process cannot answer, or has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            cause = "killed by the system, which happens when memory runs out" if code == -9 else f"exit code {code}"
            raise UsageError(
                f"the process that measured {self._name} has died ({cause}); see what it printed above"
            ) from None
        if isinstance(answer, UsageError):
            raise answer
        return answer


def runs(models: int, settings: Settings) -> int:
    """Runs of a whole measurement, warm-ups included."""
    return models * len(settings.batches) * (WARM_UPS + settings.repeats)


def turn(models: int, repeat: int) -> list[int]:
    """The order of the models within a repeat: each repeat begins with the next one, so that none is always first."""
    return [(repeat + offset) % models for offset in range(models)]


def measure_all(candidates: list[Candidate], settings: Settings, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Of each model {"samples": batch -> one Sample a repeat, "energy", "memory"}.

    Within a repeat every batch goes round the models, beginning with another one each time. advance: called after
    every run. Raises UsageError where a model cannot be loaded or measured.
    """
    with ExitStack() as stack:
        workers = []
        found: list[dict[str, Any]] = []
        for candidate in candidates:
            workers.append(stack.enter_context(Worker(candidate.name, settings)))
            energy = workers[-1].ask((candidate.source, settings))
            found.append({"energy": energy, "samples": {batch: [] for batch in settings.batches}})
        for repeat in range(-WARM_UPS, settings.repeats):
            for batch in settings.batches:
                for index in turn(len(workers), repeat):
                    sample = workers[index].ask(batch)
                    if repeat >= 0:
                        found[index]["samples"][batch].append(sample)
                    advance()
        return [each | {"memory": worker.ask(None)} for worker, each in zip(workers, found, strict=True)]


def main() -> int:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is written to stdout goes to stderr from here on

    def answer(content: Any) -> None:
        pickle.dump(content, answers)
        answers.flush()

    transformers.utils.logging.disable_progress_bar()
    try:
        source, settings = pickle.load(sys.stdin.buffer)
        with threads(settings.threads):
            model = Loaded(source, settings)
            answer(model.energy)
            while True:
                batch = pickle.load(sys.stdin.buffer)
                answer(model.memory() if batch is None else model.run(batch))
    except (EOFError, BrokenPipeError):  # the asking process has ended
        return 0
    except UsageError as error:
        answer(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
