"""All models measured in turn: each loaded in a process of its own, one computing while the others wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any, Self

from efficientllm.benching.contract import Sample, Settings
from efficientllm.benching.statistics import turn
from efficientllm.benching.subjects import Candidate
from efficientllm.errors import UsageError

WARM_UPS = 1  # runs of each batch before the first that counts


class Worker:
    """The process of one model. Its answers are those of worker.py."""

    def __init__(self, candidate: Candidate, settings: Settings) -> None:
        self._name = candidate.name
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
        # A session of its own: Ctrl-C reaches the asking process alone, which then ends this one.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "efficientllm.benching.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was written to a process that has died
                    pipe.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises UsageError where the process cannot answer, or has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            cause = "killed by the system, which happens when memory runs out" if code == -9 else f"exit code {code}"
            raise UsageError(f"the process that measured {self._name} has died ({cause}); see what it printed above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer


def runs(models: int, settings: Settings) -> int:
    """Runs of a whole measurement, warm-ups included."""
    return models * len(settings.batches) * (WARM_UPS + settings.repeats)


def measure_all(candidates: list[Candidate], settings: Settings, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Of each model {"samples": batch -> one Sample a repeat, "energy", "measurable", "memory": bytes}.

    Within a repeat every batch goes round the models, beginning with another one each time. advance: called after
    every run. Raises UsageError where a model cannot be loaded or measured.
    """
    with ExitStack() as stack:
        workers = []
        found: list[dict[str, Any]] = []
        for candidate in candidates:
            worker = stack.enter_context(Worker(candidate, settings))
            ready = worker.ask(source=candidate.source, settings=asdict(settings))
            workers.append(worker)
            found.append(ready | {"samples": {batch: [] for batch in settings.batches}})
        for repeat in range(-WARM_UPS, settings.repeats):
            for batch in settings.batches:
                for index in turn(len(workers), repeat):
                    sample = Sample(**workers[index].ask(batch=batch))
                    if repeat >= 0:
                        found[index]["samples"][batch].append(sample)
                    advance()
        for worker, result in zip(workers, found, strict=True):
            result["memory"] = worker.ask(memory=True)
    return found
