"""What the user sees on stderr while something long runs: bars in a terminal, a plain line now and then elsewhere.

Both are rich's progress: its tasks know elapsed time and the rate of the last minute (a run gets faster as its model
shrinks); where the stream is no terminal its display is never started, and its figures are written as text.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from efficientllm.sizes import format_count

Clock = Callable[[], float]
T = TypeVar("T")

LINE_INTERVAL_SECONDS = 10.0
QUIET_SECONDS = 2.0  # side work that is done sooner prints no plain line
RATE_WINDOW_SECONDS = 60.0


class _Bars(Progress):
    """rich's progress on a stream. shown: whether as bars, or as lines that its users write."""

    def __init__(self, stream: TextIO | None, clock: Clock) -> None:
        self.stream = stream if stream is not None else sys.stderr
        # rich alone would write control codes to a log file when FORCE_COLOR is set
        self.shown = self.stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=Console(file=self.stream, highlight=False),
            expand=True,
            refresh_per_second=4,  # the bar must not take a core from the training that it shows
            speed_estimate_period=RATE_WINDOW_SECONDS,
            get_time=clock,
        )
        if self.shown:
            self.start()

    def add(self, description: str, total: int, done: int = 0) -> Task:
        """A task whose rate is taken from this moment on."""
        number = self.add_task(description, total=total, status="")
        self.update(number, completed=done)  # the first sample: what was done before is no speed
        return next(task for task in self.tasks if task.id == number)

    def stop(self) -> None:
        if self.shown:
            super().stop()

    def say(self, message: str) -> None:
        if self.shown:
            self.console.print(Text(message), soft_wrap=True)
        else:
            print(message, file=self.stream, flush=True)


class RunProgress:
    """A bar over the tokens of a run, with loss, live parameters, tokens/s, elapsed time and time left.

    Where `stream` (default: stderr) is no terminal it writes a plain line at most every `interval` seconds, and one
    at the end. `start` is the number of tokens that a resumed run had seen before. `clock` returns seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        description: str = "train",
        start: int = 0,
        stream: TextIO | None = None,
        interval: float = LINE_INTERVAL_SECONDS,
        clock: Clock = time.monotonic,
    ) -> None:
        self._bars, self._interval = _Bars(stream, clock), interval
        self._task = self._bars.add(description, total, start)
        self._next_line = -math.inf
        self._unsaid = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        if self._unsaid:
            self._write_line()

    def update(
        self,
        tokens: int,
        *,
        loss: float | None = None,
        live: int | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Show that `tokens` of the run's tokens are done; values left out are not shown."""
        shown = [
            "" if loss is None else f"loss {loss:.3f}",
            "" if live is None else f"{format_count(live)} live",
            "" if tokens_per_second is None else f"{format_count(round(tokens_per_second))} tok/s",
        ]
        self._bars.update(self._task.id, completed=tokens, status="  ".join(part for part in shown if part))
        self._unsaid = not self._bars.shown
        if self._unsaid and self._bars.get_time() >= self._next_line:
            self._write_line()

    def note(self, message: str) -> None:
        """Print `message` above the bar, where it stays."""
        self._bars.say(message)

    def track(self, description: str, total: int) -> Tracker:
        """Show side work (a validation, an export) under the run's bar while it lasts; see `track`."""
        return Tracker(description, total, self._bars, self._interval)

    def _write_line(self) -> None:
        task, self._unsaid = self._task, False
        self._next_line = self._bars.get_time() + self._interval
        done, total = int(task.completed), int(task.total or 0)
        share = done / total if total else 1.0
        line = f"{task.description}: {share:.0%}, {format_count(done)} of {format_count(total)} tokens"
        line += f"  {task.fields['status']}" if task.fields["status"] else ""
        line += f"  {_duration(task.elapsed)} elapsed"
        line += f", {_duration(task.time_remaining)} left" if task.time_remaining and done < total else ""
        self._bars.say(line)


class Tracker:
    """One piece of side work, shown while the context lasts; `advance` is called as it goes on."""

    def __init__(self, description: str, total: int, bars: _Bars, interval: float) -> None:
        self._bars, self._interval = bars, interval
        self._task = bars.add(description, total)
        self._next_line = bars.get_time() + QUIET_SECONDS
        self._spoken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar away; in plain output says the time that it took, if it was announced at all."""
        if self._spoken:
            self._say("done" if self._task.finished else self._done)
        self._bars.remove_task(self._task.id)

    def advance(self, units: int = 1) -> None:
        """Count `units` more of the total as done."""
        self._bars.advance(self._task.id, units)
        now = self._bars.get_time()
        if not self._bars.shown and now >= self._next_line and not self._task.finished:
            self._next_line, self._spoken = now + self._interval, True
            self._say(self._done, " elapsed")

    @property
    def _done(self) -> str:
        return f"{int(self._task.completed)} of {int(self._task.total or 0)}"

    def _say(self, state: str, more: str = "") -> None:
        self._bars.say(f"{self._task.description}: {state}, {_duration(self._task.elapsed)}{more}")


@contextmanager
def track(
    description: str,
    total: int,
    *,
    stream: TextIO | None = None,
    interval: float = LINE_INTERVAL_SECONDS,
    clock: Clock = time.monotonic,
) -> Iterator[Tracker]:
    """Show a bar over `total` units of work while the context lasts; plain output says nothing in the first 2 s.

    Inside a RunProgress use its `track`: two bars that do not know of each other overwrite one another.
    """
    bars = _Bars(stream, clock)
    try:
        with Tracker(description, total, bars, interval) as tracker:
            yield tracker
    finally:
        bars.stop()


@contextmanager
def tracked(description: str, items: Sequence[T]) -> Iterator[Iterator[T]]:
    """The items, one after another, with a bar over them while the context lasts."""
    with track(description, len(items)) as bar:

        def each() -> Iterator[T]:
            for item in items:
                yield item
                bar.advance()

        yield each()


def _duration(seconds: float | None) -> str:
    return str(timedelta(seconds=round(seconds or 0.0)))
