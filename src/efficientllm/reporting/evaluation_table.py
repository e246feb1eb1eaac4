"""What `efficientllm eval` has measured, as rows: of several models in the terminal, of one in its card and report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Figure = tuple[float, str, float | None]  # value, name of the metric, standard error


@dataclass(frozen=True)
class Measured:
    """One figure of one task; error: its standard error, where it is known."""

    task: str
    metric: str
    value: float
    error: float | None


def measured(results: Any) -> list[Measured]:
    """Of {"results": {task: {"acc,none": 0.6, "acc_stderr,none": 0.1}}}, as lm-evaluation-harness and this package
    write it; none of anything else."""
    found = []
    tasks = results.get("results") if isinstance(results, Mapping) else None
    for task, values in tasks.items() if isinstance(tasks, Mapping) else ():
        for key, value in values.items() if isinstance(values, Mapping) else ():
            name, _, variant = str(key).partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{variant}")
                known = isinstance(error, float) and math.isfinite(error)
                found.append(Measured(str(task), name, value, error if known else None))
    return found


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
    if "limit" in results:
        parts.append(records_asked(results))
    if any(each.error is not None for each in measured(results)):
        parts.append("+- is the standard error")
    return "; ".join(parts)


def records_asked(results: Mapping[str, Any]) -> str:
    """Which records of each task (and subtask) a model was asked."""
    limit, sample = results.get("limit"), results.get("sample")
    if sample is not None:
        return f"{sample} records of each task, drawn at random"
    return "all records" if limit is None else f"only the first {limit} records of each task"


def eval_rows(
    models: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str],
    paper: Mapping[str, Mapping[str, float]],
    figure: Callable[[Mapping[str, float]], Figure],
) -> Iterator[list[str]]:
    """Header, then one row a model: accuracy in percent, its standard error, n where it is normalised by length or a;
    another metric as it is, with its name. `figure` chooses among the metrics of a task.

    models: name -> {"results": task -> {metric: value}, "mean": ...}. columns: task -> title. The paper's rows come
    last, where a task of theirs was asked for.
    """
    yield ["model", *columns.values(), "Avg of 7"]
    for name, found in models.items():
        mean = found.get("mean")
        cells = [_cell(figure(found["results"][task])) if task in found["results"] else "-" for task in columns]
        yield [name, *cells, "-" if mean is None else f"{100 * mean:.2f}"]
    if any(task in figures for figures in paper.values() for task in columns):
        for name, figures in paper.items():
            cells = [f"{figures[task]:.2f}" if task in figures else "-" for task in columns]
            seven = [value for task, value in figures.items() if task != "mmlu"]
            yield [f"paper: {name}", *cells, f"{sum(seven) / len(seven):.2f}"]


def difference_rows(
    models: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str],
    difference: Callable[[Any, Any], tuple[float, float] | None],
) -> Iterator[list[str]]:
    """Header, then a row for every model but the first: accuracy minus the first's in points, paired by record, and
    the standard error. Nothing where there is no pair. models: name -> {"right": task -> its records}."""
    first, *others = models
    rows = []
    for name in others:
        pairs = [
            difference(*(models[each].get("right", {}).get(task, {}) for each in (name, first))) for task in columns
        ]
        rows.append([name, *("-" if pair is None else f"{100 * pair[0]:+.2f} ± {100 * pair[1]:.1f}" for pair in pairs)])
    if any(cell != "-" for row in rows for cell in row[1:]):
        yield [f"minus {first}, by record", *columns.values()]
        yield from rows


def _cell(shown: Figure) -> str:
    value, metric, error = shown
    letter = {"acc_norm": "n", "acc": "a"}.get(metric)
    scale, form = (100, (".2f", ".1f")) if letter else (1, (".4g", ".2g"))
    spread = "" if error is None or error != error else f" ± {scale * error:{form[1]}}"
    return f"{scale * value:{form[0]}}{spread} {letter or metric}"
