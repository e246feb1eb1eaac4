"""Reports of changed runs, and the page as a parser and as a browser see it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Reports of the page itself: where its figures lie, and whether it or they have to be scrolled sideways.
WHERE = """<script>
const places = [...document.querySelectorAll("figure")].map(figure => {
  const { left, top, width, height } = figure.getBoundingClientRect(), box = figure.querySelector(".wide")
  return [figure.id, left, top, width, height, box.scrollWidth > box.clientWidth]
})
console.info("PLACES" + JSON.stringify([innerWidth, document.documentElement.scrollWidth, places]) + "END")
</script></body>"""
DESKTOP, PHONE, TALL = 900, 360, 6000


def browse(page: Path, folder: Path, *flags: str) -> tuple[list[str], set[str], Path]:
    """Console messages, addresses asked for, and a picture of the page."""
    assert CHROMIUM is not None
    folder.mkdir()
    log, picture = folder / "net.json", folder / "page.png"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    kept = ["--enable-logging=stderr", f"--log-net-log={log}", f"--screenshot={picture}", "--hide-scrollbars"]
    size = f"--window-size={DESKTOP + PHONE},{TALL}"
    command = [CHROMIUM, *quiet, *kept, size, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    urls = re.findall(r'"url":"(https?://[^"]+)"', log.read_text())
    console = re.findall(r"CONSOLE[^\n]*", done.stderr)
    return console, {url for url in urls if "google" not in url}, picture


def side_by_side(run: Path, folder: Path, *, control: bool) -> Path:
    """The run's page on a desktop and on a phone; control: and a page that does what is looked for."""
    (folder / "report.html").write_text((run / "report.html").read_text().replace("</body>", WHERE))
    (folder / "control.html").write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("heard")</script>')
    frame = '<iframe src="{}" style="position:absolute;border:0;top:0;left:{}px;width:{}px;height:{}px"></iframe>'
    frames = [frame.format("report.html", 0, DESKTOP, TALL), frame.format("report.html", DESKTOP, PHONE, TALL)]
    frames += [frame.format("control.html", 0, 1, 1)] if control else []
    page = folder / "both.html"
    page.write_text(f"<!doctype html><body style='margin:0'>{''.join(frames)}</body>")
    return page


def crops(console: list[str], picture: Path) -> Iterator[tuple[int, str, bool, np.ndarray]]:
    """Width of the screen, name, whether it has to be scrolled, and the picture of every figure."""
    shown = imread(picture)[..., :3]
    assert shown.shape[:2] == (TALL, DESKTOP + PHONE)
    for found in (re.search("PLACES(.*)END", line) for line in console):
        if found is None:
            continue
        screen, whole, places = json.loads(found[1])
        assert whole <= screen  # the page itself is never scrolled sideways
        for name, left, top, width, height, scrolled in places:
            assert top + height < TALL
            x = int(left) + (DESKTOP if screen == PHONE else 0)
            yield screen, name, scrolled, shown[int(top) : int(top + height), x : x + int(width)]


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


def edited(run: Path, folder: Path, **files: Any) -> Path:
    """A copy of the run's records. files: name without dots -> what becomes of its content (None: unchanged)."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report*", "checkpoints", "model", ".lock"))
    for name, change in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json")
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text(
                "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in change(lines))
            )
        else:
            file.write_text(json.dumps(change))
    return folder
