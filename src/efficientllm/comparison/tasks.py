"""Zero-shot tasks for the finished runs of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.work import ArmResult, Say, summary_of
from efficientllm.errors import UsageError
from efficientllm.evaluation.harness import (
    EvalRequest,
    check_tasks,
    evaluate,
    joined_with,
    results_file,
    same_way,
    way_of,
)
from efficientllm.files import write_json
from efficientllm.jobs.device import choose_device
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.reporting.evaluation_table import accuracy, known_results


def measure_tasks(results: Iterable[ArmResult], request: EvalRequest, device: str, say: Say) -> None:
    """Writes eval/ into each run folder that does not have these tasks, measured in this way, yet (as `eval` does).

    A task that cannot be measured is noted in its arm's task_problems; the rest of the comparison stays.
    """
    manager = check_tasks(request)
    for result in results:
        for outcome in result.runs.values():
            try:
                problems = _measure(outcome, request, manager, device, say)
            except (UsageError, OSError) as error:
                problems = dict.fromkeys(request.tasks, str(error))
            result.task_problems = problems | result.task_problems


def _measure(outcome: Outcome, request: EvalRequest, manager: Any, device: str, say: Say) -> dict[str, str]:
    """What could not be measured: task -> why."""
    model, file = _model_and_results(outcome, request)
    known = known_results(file)
    there: Mapping[str, Any] = known.get("results", {}) if same_way(known, way_of(request)) else {}
    missing = [task for task in request.tasks if task not in there]
    if not missing:
        return _without_accuracy(there, request.tasks)
    loaded = load_model(str(model), device=choose_device(device)).eval()
    found = evaluate(loaded, load_tokenizer(str(model)), replace(request, tasks=missing), manager, say)
    write_json(file, joined_with(known, found))
    problems: dict[str, str] = found["problems"]
    return _without_accuracy({**there, **found["results"]}, request.tasks) | problems


def _without_accuracy(results: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, str]:
    return {
        task: "the harness gives no accuracy for it"
        for task in tasks
        if task in results and not {"acc,none", "acc_norm,none"} & set(results[task])
    }


def task_accuracy(outcome: Outcome, task: str, request: EvalRequest) -> float | None:
    """Accuracy in [0, 1] of one run, normalised by length where the harness reports that; None where unmeasured."""
    known = known_results(_model_and_results(outcome, request)[1]).get("results", {})
    return accuracy(known[task]).value if task in known and not _without_accuracy(known, [task]) else None


def _model_and_results(outcome: Outcome, request: EvalRequest) -> tuple[Path, Path]:
    model = Path(summary_of(outcome)["result"]["path"])
    return model, results_file(model.parent, request)
