"""The report page: everything on it, of runs that are whole, under way or damaged; opened in a real browser."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import World
from efficientllm.cli import main
from efficientllm.config import load_recipe
from efficientllm.jobs import report as jobs_report
from efficientllm.jobs.report import report_after
from efficientllm.reporting import plots
from efficientllm.reporting.plot_style import run_style
from efficientllm.reporting.report_page import _models
from efficientllm.reporting.run_record import read_run
from reporting.pages import CHROMIUM, DESKTOP, PHONE, Page, browse, crops, edited, side_by_side

FIGURES = ["loss", "saliency", "ratio", "architecture", "units", "throughput"]


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """A finished run, which has left its own report."""
    assert call("prune", world.write("reported", run={"report": True})) == 0
    return world.folder / "runs" / "reported"


@pytest.fixture(autouse=True)
def no_files_of_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn for the page alone: what `run` left has the files, whose rendering is two thirds of a report's time."""
    monkeypatch.setattr(jobs_report, "save_figure", lambda figure, out: out)


def test_a_finished_run_shows_everything(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert list(page.paths) == FIGURES
    assert all(count > 10 for count in page.paths.values())
    assert not page.outside
    assert "script" not in page.tags
    assert "@import" not in text
    assert "result</td>" in text
    assert text.count('<td class="text">') == 9  # three samples: prompt, source, result
    assert "(not at hand)" not in text
    assert "saliency: gate-fisher" in text
    ids = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    names = [set(re.findall(r'id="([^"]+)"', each)) for each in ids]
    assert sum(map(len, names)) == len(set.union(*names))  # no figure takes another's shapes
    for name in FIGURES:
        for kind in ("svg", "png"):
            assert (run / "report" / f"{name}.{kind}").stat().st_size > 4_000


def test_a_page_from_before_the_end_is_made_anew(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = load_recipe(folder / "config.yaml", [f"run.dir={folder}", "run.report=true"])
    page, over = folder / "report.html", (folder / "summary.json").stat().st_mtime
    page.write_text("under way")
    os.utime(page, (over - 1, over - 1))
    report_after(recipe, print)
    text = page.read_text()
    assert "result</td>" in text
    page.write_text("of the whole run")
    report_after(recipe, print)
    assert page.read_text() == "of the whole run"


def test_several_runs_are_overlaid(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = edited(run, tmp_path / "reported-too", metrics_jsonl=lambda lines: lines[:8])  # shorter than the first
    (other / "samples.json").unlink()
    assert call("report", run, other, "--out", tmp_path, "--no-samples") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "reported-too: validation loss" in text
    assert "reported: validation loss" in text
    assert not (other / "samples.json").exists()
    assert call("report", run, run) == 2


def test_losses_of_other_tokens_are_shown_in_bits_per_byte(run: Path, tmp_path: Path) -> None:
    def told(tokens: int) -> dict[str, float]:
        return {"validation_bits_per_byte": 1.5, "vocabulary": tokens}

    other = edited(run, tmp_path / "shed")
    summary = json.loads((other / "summary.json").read_text())
    summary["result"] |= told(1234)
    (other / "summary.json").write_text(json.dumps(summary))
    source = json.loads((other / "source.json").read_text())
    (other / "source.json").write_text(json.dumps(source | told(5678)))
    rows = list(_models(read_run(other)))
    losses = [f"{each['validation_loss']:.4f}" for each in (source, summary["result"])]
    assert f"{losses[0]} (1.5000 bits per byte, 5,678 tokens)" == rows[0]["validation loss"]
    assert f"{losses[1]} (1.5000 bits per byte, 1,234 tokens)" == rows[1]["validation loss"]


def test_a_damaged_run_is_shown_as_far_as_it_goes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("report*", "checkpoints", "model", ".lock"))
    (broken / "summary.json").unlink()
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "tok')  # a line that is being written
    events = (broken / "events.jsonl").read_text().splitlines()
    (broken / "events.jsonl").write_text("\n".join([*events, events[-1]]) + "\n")  # a unit that falls twice
    assert call("report", broken) == 0
    text = (broken / "report.html").read_text()
    assert "the run has not finished" in text
    assert "the map of units is left out" in text
    assert "units" not in Page(text).paths
    (broken / "metrics.jsonl").unlink()
    assert call("report", broken) == 0
    assert "no step has been recorded yet" in (broken / "report.html").read_text()
    (tmp_path / "empty").mkdir()
    assert call("report", tmp_path / "empty") == 2
    assert "is no run folder" in capsys.readouterr().err


WIDTHS = {"layers": 2, "hidden": 40, "heads": 4, "kv_heads": 2, "intermediate": 52}
DAMAGES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {  # files, sentences on the page, figures left out
    "all losses null, no parameters": (
        {"metrics_jsonl": lambda lines: [
            {name: value for name, value in line.items() if name != "live_parameters"}
            | {"loss": None, "validation_loss": None}
            for line in lines
        ]}, [], [],
    ),
    "one line of many, a source without widths, other samples, evaluation and bench": (
        {
            "metrics_jsonl": lambda lines: [*lines[:5], "{torn", *lines[5:-1], lines[-1] | {"tokens": "6144"}],
            "source_json": {"path": "x"},
            "samples_json": {"prompt": "x"},
            "eval__results_json": {"results": {"piqa": 3}},
            "bench__results_json": {"models": 3},
        },
        [
            "metrics.jsonl: 2 of 25 lines cannot be read and are left out",
            "source.json is not of the form that efficientllm writes and is left out",
            "samples.json is not of the form",
            "eval/results.json is not of the form",
            "bench/results.json is not of the form",
        ],
        [],
    ),
    "a list as source, no summary": (
        {"source_json": [1], "summary_json": []},
        ["source.json is not of the form", "summary.json is not of the form"], ["ratio", "architecture", "units"],
    ),
    "other widths": (
        {"source_json": {"parameters": 9, "widths": WIDTHS | {"intermediate": 2}}},
        ["the map of units is left out: events and compactions do not fit each other"], ["units"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_is_damaged_costs_itself_alone(run: Path, tmp_path: Path, damage: str) -> None:
    files, sentences, left_out = DAMAGES[damage]
    broken = edited(run, tmp_path / "broken", **files)
    assert call("report", broken, "--no-samples") == 0
    text = html.unescape((broken / "report.html").read_text())
    for sentence in sentences:
        assert sentence in text
    assert text.count('class="note"') == len(sentences)
    assert "no step has been recorded" not in text
    assert list(Page(text).paths) == [name for name in FIGURES if name not in left_out]
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))


def test_a_figure_that_fails_is_a_note_on_a_page_with_all_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else, of a run that was evaluated: what its tasks were measured with, too."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(plots, "_throughput", fail)
    results = {"results": {"piqa": {"acc,none": 0.5125, "acc_stderr,none": 0.0625}}}
    results |= {"harness": "0.4.13", "limit": 40, "num_fewshot": 0}
    folder = edited(run, tmp_path / "measured", eval__results_json=results)
    assert call("report", folder, "--no-samples") == 0
    text = (folder / "report.html").read_text()
    assert "the figure of throughput is left out: by nothing" in text
    assert list(Page(text).paths) == [name for name in FIGURES if name != "throughput"]
    assert "<td>piqa</td><td>acc</td><td>0.5125</td><td>0.0625</td>" in text
    assert "lm-evaluation-harness 0.4.13; zero-shot; only the first 40 records of each task" in text


def test_many_runs_are_told_apart_below_the_data(run: Path) -> None:
    runs = [read_run(run, f"an arm with a long name, number {index}") for index in range(9)]
    assert len({run_style(index) for index in range(28)}) == 28
    for name, _, make in plots.figures(runs):
        figure = make()
        assert figure is not None
        if name in ("architecture", "units"):
            continue
        figure.savefig(io.BytesIO())  # lays it out
        (legend,) = figure.legends
        assert len(legend.get_texts()) == 9  # one entry a run
        top = legend.get_window_extent().y1
        assert all(axes.get_window_extent().y0 > top for axes in figure.axes), name
        assert all(axes.get_window_extent().height > 120 for axes in figure.axes), name
        assert legend.get_window_extent().x1 < figure.bbox.x1, name


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_every_figure_without_error_or_request(run: Path, tmp_path: Path, dark: bool) -> None:
    if CHROMIUM is None and os.environ.get("CI") != "true":
        pytest.skip("no Chromium on this machine")
    assert CHROMIUM is not None, "no Chromium on this machine: apt-get install chromium"
    page = side_by_side(run, tmp_path, control=dark)
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    console, requests, picture = browse(page, tmp_path / "browser", *flags)
    errors = [line for line in console if "PLACES" not in line]
    if dark:  # what the light one must not have would be seen
        assert any("heard" in line for line in errors)
        assert requests == {"http://127.0.0.1:9/x.png"}
    else:
        assert not errors
        assert not requests
    seen = []
    for screen, name, scrolled, shown in crops(console, picture):
        seen.append((screen, name))
        assert scrolled == (screen == PHONE)
        lightness, paper = shown.mean(axis=2), np.median(shown, axis=(0, 1))
        assert (np.abs(shown - paper).max(axis=2) > 0.2).mean() > 0.02, name  # lines, not an empty box
        assert (shown.max(axis=2) - shown.min(axis=2) > 0.15).mean() > 0.001, name  # in colour
        if name == "units":  # its own colours cover it: the margin with the labels tells the paper
            lightness = lightness[:, :20]
        assert (np.median(lightness) < 0.25) == dark, name
        assert ((lightness > 0.95).mean() < 0.05) == dark, name
    assert sorted(seen) == sorted((screen, name) for screen in (DESKTOP, PHONE) for name in FIGURES)
