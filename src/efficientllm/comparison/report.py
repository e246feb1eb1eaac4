"""A comparison from end to end, and what it writes: results.json, comparison.md, learning curves as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientllm.comparison.equal_flops import equal_flops
from efficientllm.comparison.forecast import forecast
from efficientllm.comparison.page import page
from efficientllm.comparison.rates import tune_and_run
from efficientllm.comparison.results import collect
from efficientllm.comparison.tasks import measure_tasks
from efficientllm.comparison.work import ArmResult, Comparison, Say, summary_of
from efficientllm.errors import UsageError
from efficientllm.files import write_atomically, write_json
from efficientllm.jobs.report import write_report
from efficientllm.reporting.journal import without_nonfinite
from efficientllm.reporting.plot_measurements import plot_comparison


def compare_and_report(comparison: Comparison, say: Say) -> Path:
    """The path of the page. What is finished in the folder is not run again."""
    comparison.folder.mkdir(parents=True, exist_ok=True)
    results = collect(comparison, run_comparison(comparison, say))
    page = write_page(results, comparison.folder)
    arms = results["budgets"]["tokens"].values()
    first = [Path(next(iter(arm["runs"].values()))["path"]).parent for arm in arms if arm["runs"]]
    say(f"report of each arm's first seed: {write_report(first, comparison.folder, say, samples=False)}")
    return page


def run_comparison(comparison: Comparison, say: Say) -> dict[str, dict[str, ArmResult]]:
    """Budget -> arm -> result. Equal tokens come first: they say what each arm costs, which other budgets need.

    An arm that cannot be run is left out with its sentence, the others go on. Raises UsageError where the loop
    itself cannot be run, Interrupted where a signal came.
    """
    loop = ArmResult(comparison.arms[0])
    others = [ArmResult(arm) for arm in comparison.arms[1:]]
    say(forecast(comparison))
    tune_and_run(comparison, [loop], {}, say)
    if loop.problem:
        raise UsageError(f"the loop cannot be run, and all arms are compared with it: {loop.problem}")
    loops = {seed: summary_of(outcome) for seed, outcome in loop.runs.items()}
    tune_and_run(comparison, others, loops, say)
    results = {"tokens": {result.arm.name: result for result in [loop, *others]}}
    for budget in comparison.budgets[1:]:
        results[budget] = equal_flops(comparison, results["tokens"], budget, say)
    if comparison.tasks is not None:
        every = [arm for arms in results.values() for arm in arms.values()]
        measure_tasks(every, comparison.tasks, comparison.recipe.train.device, say)
    return results


def write_page(results: Mapping[str, Any], folder: Path) -> Path:
    write_json(folder / "results.json", without_nonfinite(results))
    pictures = {}
    for budget, arms in results["budgets"].items():
        runs = {
            name: [Path(run["path"]).parent for run in arm["runs"].values()]
            for name, arm in arms.items()
            if arm["runs"]
        }
        title = f"Learning curves, budget: {budget}"
        for kind in ("png", "svg"):
            plot_comparison(runs, folder / f"curves-{budget}.{kind}", title=title)
        pictures[title] = f"curves-{budget}.png"
    out = folder / "comparison.md"
    write_atomically(out, page(results, pictures).encode())
    return out
