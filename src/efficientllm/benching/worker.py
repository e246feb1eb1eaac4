"""One model in a process of its own, so that its peak memory is its own too.

    python -m efficientllm.benching.worker

Reads requests from stdin and answers each on stdout, one JSON object a line: first {"source", "settings"}, then any
number of {"batch"} (one run) and {"memory"}. An answer with "error" is one sentence for the user. What libraries print
goes to stderr. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

import torch
import transformers

from efficientllm.benching.contract import Backend, Settings
from efficientllm.benching.energy import counter_for
from efficientllm.benching.timing import Counter, measure, threads
from efficientllm.errors import UsageError
from efficientllm.models.memory import memory_in_a_sentence, peak_resident, resident


def loader(settings: Settings) -> Callable[[str, Settings], Backend]:
    """What loads a model, once the libraries themselves take all the memory that they will."""
    if settings.backend == "llamacpp":
        from efficientllm.benching.llamacpp_backend import LlamaCppBackend

        return LlamaCppBackend
    from efficientllm.benching.transformers_backend import TransformersBackend, rehearse

    rehearse(settings)
    return TransformersBackend


def counter(settings: Settings) -> tuple[Counter | None, str]:
    if settings.device == "gpu":
        return None, "llama.cpp does not say which board it computes on"
    return counter_for(torch.device(settings.device))


def answers(requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first answer says what counts energy, or why nothing does."""
    first = next(requests)
    settings = Settings(**(first["settings"] | {"batches": tuple(first["settings"]["batches"])}))
    with threads(settings.threads):
        yield from _measured(first["source"], settings, requests)


def _measured(source: str, settings: Settings, requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    joules, about = counter(settings)
    load = loader(settings)
    before = resident()
    with memory_in_a_sentence(f"{source} does not fit in the memory of the device", "choose a smaller --dtype"):
        backend = load(source, settings)
    yield {"energy": about, "measurable": joules is not None}
    for request in requests:
        if "memory" in request:
            yield {"before": before, "peak": peak_resident(), "device_peak": backend.device_peak()}
            continue
        what = f"{source} with {request['batch']} sequences of {settings.context} tokens"
        with memory_in_a_sentence(f"{what} does not fit in the memory of the device", "lower --batch or --prompt"):
            sample = measure(backend, request["batch"], settings.generate - 1, joules)
        yield asdict(sample)


def main() -> int:
    out = own_stdout()
    transformers.utils.logging.disable_progress_bar()
    try:
        for answer in answers(json.loads(line) for line in sys.stdin):
            print(json.dumps(answer), file=out, flush=True)
    except UsageError as error:
        print(json.dumps({"error": str(error)}), file=out, flush=True)
        return 2
    except BrokenPipeError:  # the asking process is gone
        return 1
    return 0


def own_stdout() -> TextIO:
    """The stdout that was given, for answers alone; whatever else is written to it goes to stderr from here on."""
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers_to


if __name__ == "__main__":
    sys.exit(main())
