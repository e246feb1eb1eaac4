"""Zero-shot tasks for the finished runs of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from efficientllm.comparison.runner import Outcome
from efficientllm.errors import UsageError
from efficientllm.evaluation.harness import (
    EvalRequest,
    accuracy,
    check_tasks,
    evaluate,
    joined_with,
    known_results,
    same_way,
    way_of,
)
from efficientllm.jobs.job import choose_device
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.reporting.journal import write_atomically


def measure_tasks(outcomes: Iterable[Outcome], request: EvalRequest, device: str, say: Callable[[str], None]) -> None:
    """Writes eval/results.json into each run folder that does not have these tasks, measured in this way, yet."""
    manager = check_tasks(request)
    for outcome in outcomes:
        assert outcome.summary is not None
        model = Path(outcome.summary["result"]["path"])
        file = model.parent / "eval" / "results.json"
        known = known_results(file)
        if same_way(known, way_of(request)) and set(request.tasks) <= set(known.get("results", ())):
            continue
        loaded = load_model(str(model), device=choose_device(device)).eval()
        found = evaluate(loaded, load_tokenizer(str(model)), request, manager, say)
        if found["problems"]:
            task, why = next(iter(found["problems"].items()))
            raise UsageError(f"task {task} cannot be measured: {why}")
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, (json.dumps(joined_with(known, found), indent=1) + "\n").encode())


def accuracies(outcome: Outcome, tasks: Iterable[str]) -> dict[str, float]:
    """Task -> accuracy in [0, 1] of one run, normalised by length where the harness reports that."""
    assert outcome.summary is not None
    known = known_results(Path(outcome.summary["result"]["path"]).parent / "eval" / "results.json").get("results", {})
    return {task: accuracy(known[task])[0] for task in tasks if task in known}
