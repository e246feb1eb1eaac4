"""The report of one or several runs: report.html and its plots as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from efficientllm.config import Recipe
from efficientllm.files import write_atomically
from efficientllm.jobs.samples import write_samples
from efficientllm.reporting.plot_style import inline_svg, save_figure
from efficientllm.reporting.plots import figures
from efficientllm.reporting.report_page import page
from efficientllm.reporting.run_record import RunRecord, read_run

PAGE, PLOTS = "report.html", "report"


def write_report(runs: Sequence[Path], out: Path, say: Callable[[str], None], *, samples: bool = True) -> Path:
    """Writes OUT/report.html and OUT/report/*.{svg,png}; returns the page.

    samples: let source and result write, where that has not been done (loads both models). Raises UsageError for a
    folder that is no run; a run under way or damaged is shown as far as it goes, with a sentence on the page.
    """
    records = [_read(path, runs, say, samples=samples) for path in runs]
    notes: list[str] = []
    drawn = _draw(records, out / PLOTS, notes)
    for run in records:
        for note in run.notes:
            say(f"{run.path}: {note}")
    for note in notes:
        say(note)
    write_atomically(out / PAGE, page(records, drawn, notes).encode())
    return out / PAGE


def _read(path: Path, runs: Sequence[Path], say: Callable[[str], None], *, samples: bool) -> RunRecord:
    same = [other for other in runs if other.resolve().name == path.resolve().name]
    name = "/".join(path.resolve().parts[-2:]) if len(same) > 1 else None
    record = read_run(path, name)
    if samples and record.summary is not None and not record.samples:
        write_samples(path, say)
        record = read_run(path, name)
    return record


def _draw(records: Sequence[RunRecord], folder: Path, notes: list[str]) -> dict[str, tuple[str, str]]:
    """File stem -> (caption, inline SVG), each also as files; a figure that fails becomes a note, and no other does."""
    drawn = {}
    for name, caption, make in figures(records):
        try:
            figure = make()
            if figure is None:
                continue
            drawn[name] = (caption, inline_svg(figure, name))
        except Exception as error:
            notes.append(f"the figure of {name} is left out: {error or type(error).__name__}")
            continue
        for kind in ("svg", "png"):
            save_figure(figure, folder / f"{name}.{kind}")
    return drawn


def report_after(recipe: Recipe, say: Callable[[str], None]) -> None:
    """The report at the end of a run, once. The run is done and saved: whatever goes wrong here is only said."""
    folder = Path(recipe.run.dir)
    if not recipe.run.report or _is_of_the_whole_run(folder / PAGE):
        return
    try:
        say(f"report: {write_report([folder], folder, say)}")
    except Exception as error:
        say(f"the report could not be written ({error}); the run itself is done: efficientllm report {folder}")


def _is_of_the_whole_run(page: Path) -> bool:
    """Whether a page was made since the run was over; one that somebody has made before that does not show its end."""
    summary = page.with_name("summary.json")
    return page.is_file() and summary.is_file() and page.stat().st_mtime_ns >= summary.stat().st_mtime_ns
