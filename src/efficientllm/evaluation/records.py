"""Single records of a task: which are drawn, which a model got right, and how two models differ on the same ones."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from efficientllm.evaluation.tasks import TASKS

Right = Mapping[str, Mapping[str, int]]  # task without subtasks -> number of the record -> 1 where it was right, else 0

SEED = 0


def drawn(task: str, sample: int, manager: Any) -> dict[str, list[int]]:
    """For each task in the one named (itself, or its subtasks) so many numbers of records, all where it has fewer.

    A function of the name and of the number of its records alone, so that every model is asked the same. Ascending,
    which is the order in which the harness names them.
    """
    chosen = {}
    for name, leaf in manager.load([task])["tasks"].items():
        number = len(leaf.eval_docs)
        chosen[name] = sorted(random.Random(f"{SEED} {name}").sample(range(number), min(sample, number)))
    return chosen


def right_records(output: Mapping[str, Any], metric: str) -> dict[str, dict[str, int]]:
    """From the harness's logged samples; empty where the metric is no accuracy."""
    if metric not in ("acc", "acc_norm"):
        return {}
    return {
        name: {str(record["doc_id"]): int(record[metric]) for record in records if metric in record}
        for name, records in output["samples"].items()
    }


def paired_difference(own: Right, other: Right) -> tuple[float, float] | None:
    """Accuracy minus the other's in [-1, 1] over the records that both were asked, and its standard error: that of the
    mean of the records' differences, nan for a single one. None where there are none."""
    differences = [
        right - other[name][record]
        for name, records in own.items()
        for record, right in records.items()
        if record in other.get(name, {})
    ]
    if not differences:
        return None
    error = math.nan if len(differences) < 2 else statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), error


def difference_rows(models: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> list[list[str]]:
    """Header, then a row for every model but the first: accuracy minus the first's in points, paired by record, and
    the standard error. Nothing where there is no pair. models: name -> {"right": task -> its records}."""
    first, *others = models
    rows = []
    for name in others:
        own, base = (models[each].get("right", {}) for each in (name, first))
        pairs = [paired_difference(own.get(task, {}), base.get(task, {})) for task in tasks]
        rows.append([name, *("-" if pair is None else f"{100 * pair[0]:+.2f} ± {100 * pair[1]:.1f}" for pair in pairs)])
    if all(cell == "-" for row in rows for cell in row[1:]):
        return []
    return [[f"minus {first}, by record", *(TASKS.get(task, task) for task in tasks)], *rows]
