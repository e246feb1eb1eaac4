"""Runs of a comparison: each in a process of its own, one after another, or side by side over several GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from efficientllm.comparison.worker import WINDOWS
from efficientllm.config import Recipe, dump_recipe
from efficientllm.files import read_json, write_atomically
from efficientllm.jobs.interruption import Interrupted
from efficientllm.jobs.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """What came of one run: its summary and windows, or in one sentence why there are none."""

    summary: dict[str, Any] | None
    windows: dict[str, Any] | None
    problem: str | None = None


def outcome_of(folder: Path) -> Outcome | None:
    """Of a run folder that is finished and measured; None where it is not. Raises UsageError where it is damaged."""
    mend = f"delete {folder} and run the same command again"
    summary, windows = (read_json(folder / name, mend) for name in ("summary.json", WINDOWS))
    return Outcome(summary, windows) if summary is not None and windows is not None else None


def run_all(recipes: Sequence[Recipe], *, devices: int, say: Callable[[str], None]) -> list[Outcome]:
    """Outcomes in the order of the recipes; of finished runs they are only read. devices: GPUs to spread the others
    over; 0 or 1: one run after another.

    Raises Interrupted, with every run saved, where one of them was stopped by a signal; UsageError where the folder of
    one is damaged or belongs to another recipe.
    """
    free: SimpleQueue[str | None] = SimpleQueue()
    for name in _device_names(devices):
        free.put(name)
    with _children() as children, ThreadPoolExecutor(max_workers=max(1, devices)) as pool:

        def one(numbered: tuple[int, Recipe]) -> Outcome:
            number, recipe = numbered
            folder = RunFolder(recipe.run.dir)
            folder.check(recipe)
            if (known := outcome_of(folder.path)) is not None:
                return known
            device = free.get()
            try:
                say(f"run {number} of {len(recipes)}: {recipe.run.dir}")
                return _run(recipe, device, children)
            finally:
                free.put(device)

        return list(pool.map(one, enumerate(recipes, 1)))


def _device_names(devices: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is to say for each place; None: leave it."""
    if devices < 2:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(visible.split(",")[:devices]) if visible else [str(index) for index in range(devices)]


def _run(recipe: Recipe, device: str | None, children: _Children) -> Outcome:
    folder = Path(recipe.run.dir)
    path = folder.parent / f"{folder.name}.yaml"
    write_atomically(path, dump_recipe(recipe).encode())
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    code = children.call([sys.executable, "-m", "efficientllm.comparison.worker", str(path)], environment)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
        stopped = code - 128 if code > 0 else -code
        raise Interrupted("stopped; the same command goes on from there", stopped)
    if code == 0:
        outcome = outcome_of(folder)
        assert outcome is not None, f"{folder} ended without a summary"
        return outcome
    error = path.with_suffix(".error")
    reason = error.read_text().strip() if error.is_file() else f"its process ended with {code} (see what it printed)"
    return Outcome(None, None, reason)


class _Children:
    """Processes under way; a signal to this process is handed on, so that each saves its run."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.signum: int | None = None

    def call(self, argv: Sequence[str], environment: dict[str, str]) -> int:
        if self.signum is not None:
            return 128 + self.signum
        # A session of its own: Ctrl-C reaches it once, from here.
        child = subprocess.Popen(argv, env=environment, start_new_session=True)
        self.running.add(child)
        try:
            return child.wait()
        finally:
            self.running.discard(child)

    def stop(self, signum: int, frame: object) -> None:
        self.signum = signum
        for child in list(self.running):
            with suppress(ProcessLookupError):
                child.send_signal(signum)


@contextmanager
def _children() -> Any:
    children = _Children()
    old = {number: signal.signal(number, children.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
