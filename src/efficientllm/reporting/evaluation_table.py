"""What lm-evaluation-harness has measured, {"results": {task: {"acc,none": 0.6, ...}}, "harness": ...}, as figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from efficientllm.reporting.tables import rows_of

BY_TASK = ("results", "versions", "records", "right")  # what a file of results has of every task


class Figure(NamedTuple):
    """One figure of a task; error: its standard error, where it is known."""

    metric: str
    value: float
    error: float | None

    def __str__(self) -> str:
        """Accuracy in percent, n where it is normalised by length or a; another metric as it is, with its name."""
        letter = {"acc_norm": "n", "acc": "a"}.get(self.metric)
        scale, form, fine = (100, ".2f", ".1f") if letter else (1, ".4g", ".2g")
        spread = "" if self.error is None else f" ± {scale * self.error:{fine}}"
        return f"{scale * self.value:{form}}{spread} {letter or self.metric}"


def known_results(file: Path) -> dict[str, Any]:
    """What an earlier evaluation has left; nothing where there is none or it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(content, dict) and all(isinstance(content.get(key, {}), dict) for key in BY_TASK)
    return content if whole else {}


def figures_of(values: Any) -> list[Figure]:
    """Of one task's {"acc,none": 0.6, "acc_stderr,none": 0.1}; none of anything else."""
    found = []
    for key, value in values.items() if isinstance(values, Mapping) else ():
        metric, comma, variant = str(key).partition(",")
        if comma and isinstance(value, float) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{variant}")
            known = isinstance(error, float) and math.isfinite(error)
            found.append(Figure(metric, value, error if known else None))
    return found


def accuracy(values: Any) -> Figure:
    """Accuracy in [0, 1], normalised by length where the harness reports that, else the task's first metric, whatever
    its range."""
    by_metric = {figure.metric: figure for figure in reversed(figures_of(values))}
    return by_metric.get("acc_norm") or by_metric.get("acc") or figures_of(values)[0]


def measured(results: Any) -> Iterator[tuple[str, Figure]]:
    """Every figure of every task; none of what is no results."""
    tasks = results.get("results") if isinstance(results, Mapping) else None
    for task, values in tasks.items() if isinstance(tasks, Mapping) else ():
        yield from ((str(task), figure) for figure in figures_of(values))


def measured_rows(results: Any) -> list[list[str]]:
    """The figures as a table, its head first; nothing where there are none."""
    return rows_of(
        {
            "task": task,
            "metric": metric,
            "value": f"{value:.4f}",
            "standard error": "" if error is None else f"{error:.4f}",
        }
        for task, (metric, value, error) in measured(results)
    )


def evaluation_way(results: Any) -> str:
    """How it was measured, as far as the results say; "" where they say nothing."""
    if not isinstance(results, Mapping):
        return ""
    parts = []
    if "harness" in results:
        parts.append(f"lm-evaluation-harness {results['harness']}")
    if "num_fewshot" in results:
        shots = results["num_fewshot"]
        parts.append("zero-shot" if shots == 0 else f"{shots} examples in the prompt")
    limit, sample = results.get("limit"), results.get("sample")
    if sample is not None:
        parts.append(f"{sample} records of each task, drawn at random")
    elif "limit" in results:
        parts.append("all records" if limit is None else f"only the first {limit} records of each task")
    return "; ".join(parts)
