"""What `efficientllm eval` has measured, as rows, and how, as a sentence: for model cards and reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from efficientllm.reporting.run_forms import is_number

Row = tuple[str, str, str, str]


def evaluation_rows(results: Any) -> list[Row]:
    """(task, metric, value, standard error) for every number found.

    Read are {task: number}, {task: {metric: number}} and lm-evaluation-harness's {"results": {...}} with its "acc,none"
    and standard errors.
    """
    tasks = results.get("results", results.get("tasks", results)) if isinstance(results, Mapping) else None
    if not isinstance(tasks, Mapping):
        return []
    return [row for task, values in tasks.items() for row in _rows(str(task), values)]


def _rows(task: str, values: Any) -> Iterator[Row]:
    if is_number(values):
        yield task, "", f"{values:.4f}", ""
    elif isinstance(values, Mapping):
        for metric, value in values.items():
            name, _, variant = str(metric).partition(",")
            if not is_number(value) or name.endswith("_stderr") or isinstance(value, int):
                continue
            error = values.get(f"{name}_stderr,{variant}" if variant else f"{name}_stderr")
            yield task, name, f"{value:.4f}", f"{error:.4f}" if is_number(error) and error == error else ""


def evaluation_table(results: Any) -> str | None:
    """The rows in Markdown; None where no number is found."""
    rows = evaluation_rows(results)
    if not rows:
        return None
    shown = [(task, metric, f"{value} +- {error}" if error else value) for task, metric, value, error in rows]
    return "\n".join(
        ["| task | metric | value |", "| --- | --- | ---: |", *(f"| {' | '.join(row)} |" for row in shown)]
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
    if "limit" in results:
        parts.append(records_asked(results))
    if _has_errors(results):
        parts.append("+- is the standard error")
    return "; ".join(parts)


def records_asked(results: Mapping[str, Any]) -> str:
    """Which records of each task (and subtask) a model was asked."""
    limit, sample = results.get("limit"), results.get("sample")
    if sample is not None:
        return f"{sample} records of each task, drawn at random"
    return "all records" if limit is None else f"only the first {limit} records of each task"


def _has_errors(results: Any) -> bool:
    return any(error for *_, error in evaluation_rows(results))
