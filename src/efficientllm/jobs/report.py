"""The report of one or several runs: report.html and its plots as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from efficientllm.config import Recipe
from efficientllm.jobs.samples import write_samples
from efficientllm.reporting.journal import write_atomically
from efficientllm.reporting.plots import save_figure
from efficientllm.reporting.report_page import page
from efficientllm.reporting.report_plots import figures
from efficientllm.reporting.run_record import RunRecord, read_run

PAGE, PLOTS = "report.html", "report"


def write_report(runs: Sequence[Path], out: Path, say: Callable[[str], None], *, samples: bool = True) -> Path:
    """Writes OUT/report.html and OUT/report/*.{svg,png}; returns the page.

    samples: let source and result write, where that has not been done (loads both models). Raises UsageError for a
    folder that is no run; a run under way or damaged is shown as far as it goes, with a sentence on the page.
    """
    records = [_read(path, runs, say, samples=samples) for path in runs]
    drawn = figures(records)
    for name, (_, figure) in drawn.items():
        for kind in ("svg", "png"):
            save_figure(figure, out / PLOTS / f"{name}.{kind}")
    content = page(records, drawn)
    write_atomically(out / PAGE, content.encode())
    return out / PAGE


def _read(path: Path, runs: Sequence[Path], say: Callable[[str], None], *, samples: bool) -> RunRecord:
    same = [other for other in runs if other.resolve().name == path.resolve().name]
    name = "/".join(path.resolve().parts[-2:]) if len(same) > 1 else None
    record = read_run(path, name)
    if samples and record.summary is not None and not record.samples:
        write_samples(path, say)
        record = read_run(path, name)
    for note in record.notes:
        say(f"{path}: {note}")
    return record


def report_after(recipe: Recipe, say: Callable[[str], None]) -> None:
    """The report at the end of a run, once. The run is done and saved: whatever goes wrong here is only said."""
    folder = Path(recipe.run.dir)
    if not recipe.run.report or (folder / PAGE).is_file():
        return
    try:
        say(f"report: {write_report([folder], folder, say)}")
    except Exception as error:
        say(f"the report could not be written ({error}); the run itself is done: efficientllm report {folder}")
