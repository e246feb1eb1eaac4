"""From samples to what is reported: plain dictionaries, as they go into JSON and into the tables."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from efficientllm.benching.process import WARM_UPS, Timing
from efficientllm.benching.settings import Settings
from efficientllm.benching.subjects import BenchModel

Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest of the repeats."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(own: Sequence[float], first: Sequence[float]) -> Spread:
    """Of own / first repeat by repeat, so that what slows a whole repeat down on both sides falls out."""
    return spread([a / b for a, b in zip(own, first, strict=True)])


def result_of(subjects: list[BenchModel], settings: Settings, found: list[dict[str, Any]]) -> dict[str, Any]:
    """settings, machine, and of each model facts, memory, and by batch all samples and what follows.

    Seconds, tokens per second, bytes. Ratios are to the first model, above 1 where this one is faster.
    """
    models = []
    for subject, each in zip(subjects, found, strict=True):
        firsts = found[0]["samples"]
        batches = {str(batch): _batch(batch, own, firsts[batch], settings) for batch, own in each["samples"].items()}
        models.append({"model": subject.name, "facts": subject.facts, "memory": each["memory"], "batches": batches})
    return {"settings": asdict(settings) | {"warm_ups": WARM_UPS}, "machine": machine(settings), "models": models}


def _batch(batch: int, own: list[Timing], first: list[Timing], settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {"time_to_first_token": spread([sample["prefill_seconds"] for sample in own])}
    for phase, tokens in (("prefill", batch * settings.prompt), ("decode", batch * (settings.generate - 1))):
        seconds, others = ([sample[f"{phase}_seconds"] for sample in side] for side in (own, first))
        found[f"{phase}_tokens_per_second"] = spread([tokens / value for value in seconds])
        found[f"{phase}_ratio"] = ratios(others, seconds)
    return found | {"samples": own}


def machine(settings: Settings) -> dict[str, str]:
    """What the figures were measured on: processor or GPU, and the versions that computed."""
    if settings.device == "cpu":
        device = _processor()
    elif settings.device == "gpu":  # llama.cpp takes all that it finds and does not say which these are
        boards = dict.fromkeys(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        device = ", ".join(boards) or "an accelerator that llama.cpp does not name"
    else:
        device = torch.cuda.get_device_name(settings.device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if settings.backend == "llamacpp":
        import llama_cpp

        versions = {"llama-cpp-python": llama_cpp.__version__}
    return {"python": platform.python_version(), "device": device} | versions


def _processor() -> str:
    """As Linux calls it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
