"""The report page: everything on it, of runs that are whole, under way or damaged; opened in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import World
from efficientllm.cli import main

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


class Page(HTMLParser):
    """ids of figures, paths drawn in each, and every reference that leads out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.paths: dict[str, int] = {}
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.figure: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag == "figure":
            self.figure = values["id"]
            self.paths[self.figure] = 0
        if tag in ("path", "use", "image") and self.figure:
            self.paths[self.figure] += 1
        for name in ("href", "src", "xlink:href"):
            if values.get(name, "#")[0] != "#" and not values[name].startswith("data:"):
                self.outside.append(values[name])


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
    assert "saliency: taylor-element" in text
    ids = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    names = [set(re.findall(r'id="([^"]+)"', each)) for each in ids]
    assert sum(map(len, names)) == len(set.union(*names))  # no figure takes another's shapes
    for name in FIGURES:
        for kind in ("svg", "png"):
            assert (run / "report" / f"{name}.{kind}").stat().st_size > 4_000


def test_several_runs_are_overlaid(world: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", world.write("reported-too", train={"seed": 7})) == 0
    capsys.readouterr()
    other = world.folder / "runs" / "reported-too"
    assert call("report", run, other, "--out", tmp_path, "--no-samples") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "reported-too: validation" in text
    assert "reported: validation" in text
    assert not (other / "samples.json").exists()
    assert call("report", run, run) == 2


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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page: Path, folder: Path) -> tuple[list[str], set[str], Path]:
    """Console messages, addresses requested from this machine's network, and a screenshot of a page."""
    assert CHROMIUM is not None
    log, picture = folder / "net.json", folder / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--enable-logging=stderr", f"--log-net-log={log}", f"--screenshot={picture}", "--window-size=900,3000"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    urls = re.findall(r'"url":"(https?://[^"]+)"', log.read_text())
    return re.findall("CONSOLE.*", done.stderr), {url for url in urls if "google" not in url}, picture


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_opens_it_without_error_or_request(run: Path, tmp_path: Path) -> None:
    console, requests, picture = browse(run / "report.html", tmp_path)
    assert not console
    assert not requests
    from matplotlib.image import imread

    shown = imread(picture)[..., :3]
    assert shown.shape[:2] == (3000, 900)
    assert ((shown.max(axis=2) - shown.min(axis=2)) > 0.25).mean() > 0.005  # coloured lines, not an empty page
    control = tmp_path / "control.html"  # what is looked for above would be seen
    control.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("heard")</script>')
    (tmp_path / "control").mkdir()
    console, requests, _ = browse(control, tmp_path / "control")
    assert any("heard" in line for line in console)
    assert "http://127.0.0.1:9/x.png" in requests
