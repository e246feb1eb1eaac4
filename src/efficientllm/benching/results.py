"""From samples to what is reported: plain dictionaries, as they go into JSON and into the tables."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from efficientllm.benching.contract import Sample, Settings
from efficientllm.benching.runner import WARM_UPS
from efficientllm.benching.statistics import energy_per_token, ratios, spread
from efficientllm.benching.subjects import Candidate


def result_of(candidates: list[Candidate], settings: Settings, found: list[dict[str, Any]]) -> dict[str, Any]:
    """settings, machine, and of each model facts, memory, energy, and by batch all samples and what follows.

    Seconds, tokens per second, joules per token, bytes. Ratios are to the first model, above 1 where this one is
    faster, paired repeat by repeat.
    """
    models = []
    for candidate, each in zip(candidates, found, strict=True):
        batches = {
            str(batch): _batch(batch, each["samples"][batch], found[0]["samples"][batch], settings)
            for batch in settings.batches
        }
        energy = {"measurable": each["measurable"], "about": each["energy"]}
        models.append(
            {"model": candidate.name}
            | {"facts": asdict(candidate.facts), "memory": each["memory"], "energy": energy, "batches": batches}
        )
    return {"settings": asdict(settings) | {"warm_ups": WARM_UPS}, "machine": machine(settings), "models": models}


def _batch(batch: int, own: Sequence[Sample], first: Sequence[Sample], settings: Settings) -> dict[str, Any]:
    prompts, steps = batch * settings.prompt, batch * (settings.generate - 1)
    prefill, decode = ([each.prefill_seconds for each in own], [each.decode_seconds for each in own])
    return {
        "time_to_first_token": asdict(spread(prefill)),
        "prefill_tokens_per_second": asdict(spread([prompts / seconds for seconds in prefill])),
        "decode_tokens_per_second": asdict(spread([steps / seconds for seconds in decode])),
        "prefill_joules_per_token": energy_per_token([each.prefill_joules for each in own], prompts),
        "decode_joules_per_token": energy_per_token([each.decode_joules for each in own], steps),
        "prefill_ratio": asdict(ratios([each.prefill_seconds for each in first], prefill)),
        "decode_ratio": asdict(ratios([each.decode_seconds for each in first], decode)),
        "samples": [asdict(each) for each in own],
    }


def machine(settings: Settings) -> dict[str, str]:
    """What the figures were measured on: processor or GPU, and the versions that computed."""
    name = _processor()
    if settings.device.startswith("cuda"):
        name = torch.cuda.get_device_name(settings.device)
    elif settings.device == "gpu":
        name = _accelerators()
    versions = {"python": platform.python_version()}
    if settings.backend == "llamacpp":
        import llama_cpp

        return versions | {"device": name, "llama-cpp-python": llama_cpp.__version__}
    return versions | {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def _accelerators() -> str:
    """Of llama.cpp, which takes all that it finds and does not say through this interface which these are."""
    names = dict.fromkeys(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return ", ".join(names) or "an accelerator that llama.cpp does not name"


def _processor() -> str:
    """As Linux calls it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
