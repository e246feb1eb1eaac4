"""The paper's tasks as lm-evaluation-harness names them, and the paper's own figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from efficientllm.reporting.evaluation_table import accuracy

# Harness name -> column of the paper's Table 2.
COMMON_SENSE = {
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "boolq": "BoolQ",
    "hellaswag": "HellaSwag",
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "winogrande": "WinoGr.",
}
TASKS = {"mmlu": "MMLU"} | COMMON_SENSE
_COLUMNS = ("mmlu", *COMMON_SENSE)

# Table 2 of EfficientLLM (Xing et al., ACL 2026): zero-shot accuracy in percent, columns as in TASKS.
# The paper does not say where it normalises by length.
_TABLE_2 = {
    "SmolLM-135M (600B tokens)": (30.05, 29.35, 61.32, 59.85, 42.67, 34.40, 68.55, 52.96),
    "EfficientLLM-A 134M (500B)": (30.54, 30.97, 62.88, 60.40, 43.81, 33.60, 68.82, 53.28),
    "SmolLM-360M (600B)": (33.89, 36.26, 70.16, 55.23, 53.51, 37.60, 71.38, 57.22),
    "Qwen2.5-0.5B (17T)": (33.37, 32.17, 64.44, 61.99, 52.09, 35.20, 70.29, 56.20),
    "EfficientLLM-A 469M (50B)": (33.09, 35.92, 70.50, 59.85, 53.16, 35.00, 72.69, 56.27),
    "EfficientLLM-A 469M (500B)": (34.54, 38.40, 72.10, 62.42, 56.84, 40.40, 73.83, 57.46),
    "ShearedLlama-1.3B (50B)": (31.51, 29.44, 61.07, 61.83, 59.33, 34.40, 73.94, 58.01),
    "OLMo-1B (2T)": (32.03, 30.72, 63.55, 61.38, 62.86, 36.40, 75.35, 59.35),
    "Llama3.2-1B": (36.31, 31.48, 65.28, 63.88, 63.69, 37.40, 74.59, 60.54),
    "EfficientLLM-A 1.1B (50B)": (36.71, 40.36, 73.61, 62.39, 60.24, 40.20, 75.19, 61.25),
    "EfficientLLM-A 1.1B (320B)": (37.71, 42.24, 73.48, 67.09, 64.09, 41.80, 75.41, 61.17),
}
PAPER: dict[str, dict[str, float]] = {
    name: dict(zip(_COLUMNS, figures, strict=True)) for name, figures in _TABLE_2.items()
}


def common_sense_mean(accuracies: Mapping[str, float]) -> float | None:
    """Mean of the seven common-sense tasks, MMLU apart, as the paper takes it; None where one of them is missing."""
    values = [accuracies.get(task) for task in COMMON_SENSE]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def eval_rows(models: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> Iterator[list[str]]:
    """Header, then one row a model, each task by its `accuracy`; the paper's rows come last, where a task of theirs was
    asked for. models: name -> {"results": task -> {metric: value}, "mean": ...}."""
    yield ["model", *(TASKS.get(task, task) for task in tasks), "Avg of 7"]
    for name, found in models.items():
        mean = found.get("mean")
        cells = [str(accuracy(found["results"][task])) if task in found["results"] else "-" for task in tasks]
        yield [name, *cells, "-" if mean is None else f"{100 * mean:.2f}"]
    for name, figures in PAPER.items() if any(task in TASKS for task in tasks) else ():
        cells = [f"{figures[task]:.2f}" if task in figures else "-" for task in tasks]
        yield [f"paper: {name}", *cells, f"{common_sense_mean(figures):.2f}"]
