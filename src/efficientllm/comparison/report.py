"""Runs a comparison and writes what came of it: results.json, comparison.md, learning curves as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efficientllm.comparison.compare import run_comparison
from efficientllm.comparison.page import page
from efficientllm.comparison.results import collect
from efficientllm.comparison.work import Comparison
from efficientllm.files import write_atomically, write_json
from efficientllm.jobs.report import write_report
from efficientllm.reporting.comparison_plot import plot_comparison
from efficientllm.reporting.journal import without_nonfinite


def compare_and_report(comparison: Comparison, say: Callable[[str], None]) -> Path:
    """The path of the page. What is finished in the folder is not run again."""
    comparison.folder.mkdir(parents=True, exist_ok=True)
    results = collect(comparison, run_comparison(comparison, say))
    page = write_page(results, comparison.folder)
    arms = results["budgets"]["tokens"].values()
    first = [Path(next(iter(arm["runs"].values()))["path"]).parent for arm in arms if arm["runs"]]
    say(f"report of each arm's first seed: {write_report(first, comparison.folder, say, samples=False)}")
    return page


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
