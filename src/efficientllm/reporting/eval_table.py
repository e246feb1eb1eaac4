"""The table of an evaluation: models by tasks, each figure with its metric, the paper's Table 2 beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def eval_rows(
    models: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], paper: Mapping[str, Mapping[str, float]]
) -> Iterator[list[str]]:
    """Header, then one row a model: accuracy in percent, its standard error, n where it is normalised by length or a.

    models: name -> {"results": task -> {metric: value}, "mean": ...}. columns: task -> title. The paper's rows come
    last, where a task of theirs was asked for.
    """
    yield ["model", *columns.values(), "Avg of 7"]
    for name, found in models.items():
        mean = found.get("mean")
        cells = [_cell(found["results"].get(task)) for task in columns]
        yield [name, *cells, "-" if mean is None else f"{100 * mean:.2f}"]
    if any(task in figures for figures in paper.values() for task in columns):
        for name, figures in paper.items():
            cells = [f"{figures[task]:.2f}" if task in figures else "-" for task in columns]
            seven = [value for task, value in figures.items() if task != "mmlu"]
            yield [f"paper: {name}", *cells, f"{sum(seven) / len(seven):.2f}"]


def _cell(values: Mapping[str, float] | None) -> str:
    if values is None:
        return "-"
    normed = "acc_norm,none" in values
    metric = "acc_norm" if normed else "acc"
    error = values.get(f"{metric}_stderr,none")
    spread = "" if error is None or error != error else f" ± {100 * error:.1f}"
    return f"{100 * values[f'{metric},none']:.2f}{spread} {'n' if normed else 'a'}"


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
