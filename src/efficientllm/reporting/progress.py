"""What the user sees on stderr while something long runs: bars in a terminal, a plain line now and then elsewhere."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from efficientllm.sizes import format_count

Clock = Callable[[], float]

LINE_INTERVAL_SECONDS = 10.0
QUIET_SECONDS = 2.0  # side work that is done sooner prints no plain line
RATE_WINDOW_SECONDS = 60.0


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
        self._total = total
        self._description = description
        self._stream = stream if stream is not None else sys.stderr
        self._interval = interval
        self._clock = clock
        self._tokens = start
        self._status = ""
        self._began = clock()
        self._remaining = _Remaining(total, start, self._began)
        self._last_line: float | None = None
        self._unsaid = False
        self._bars = _bars(self._stream, clock) if _is_terminal(self._stream) else None
        self._bar = TaskID(0)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bar = self._bars.add_task(
                self._description, total=self._total, completed=self._tokens, status="", remaining=None
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif self._unsaid:
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
        self._tokens = tokens
        shown = [
            "" if loss is None else f"loss {loss:.3f}",
            "" if live is None else f"{format_count(live)} live",
            "" if tokens_per_second is None else f"{format_count(round(tokens_per_second))} tok/s",
        ]
        self._status = "  ".join(part for part in shown if part)
        now = self._clock()
        remaining = self._remaining.observe(tokens, now)
        if self._bars is not None:
            self._bars.update(self._bar, completed=tokens, status=self._status, remaining=remaining)
        elif self._last_line is None or now - self._last_line >= self._interval:
            self._last_line = now
            self._write_line()
        else:
            self._unsaid = True

    def note(self, message: str) -> None:
        """Print `message` above the bar, where it stays."""
        if self._bars is not None:
            self._bars.console.print(Text(message), soft_wrap=True)
        else:
            self._write(message)

    def track(self, description: str, total: int) -> AbstractContextManager["Tracker"]:
        """Show side work (a validation, an export) under the run's bar while it lasts; see `track`."""
        return _tracking(Tracker(description, total, self._stream, self._interval, self._clock, self._bars))

    def _write_line(self) -> None:
        elapsed = self._clock() - self._began
        share = self._tokens / self._total if self._total else 1.0
        line = f"{self._description}: {share:.0%}, {format_count(self._tokens)} of {format_count(self._total)} tokens"
        if self._status:
            line += f"  {self._status}"
        line += f"  {_duration(elapsed)} elapsed"
        if self._remaining.seconds is not None and self._tokens < self._total:
            line += f", {_duration(self._remaining.seconds)} left"
        self._unsaid = False
        self._write(line)

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class Tracker:
    """One piece of side work; `advance` is called as it goes on."""

    def __init__(
        self, description: str, total: int, stream: TextIO, interval: float, clock: Clock, bars: Progress | None
    ) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._began = clock()
        self._next_line = self._began + QUIET_SECONDS
        self._remaining = _Remaining(total, 0, self._began)
        self._bars = bars
        self._spoken = False
        self._bar = TaskID(0)
        if bars is not None:
            self._bar = bars.add_task(description, total=total, status="", remaining=None)

    def advance(self, units: int = 1) -> None:
        """Count `units` more of the total as done."""
        self._done += units
        now = self._clock()
        remaining = self._remaining.observe(self._done, now)
        if self._bars is not None:
            self._bars.update(self._bar, completed=self._done, remaining=remaining)
        elif now >= self._next_line and self._done < self._total:
            self._next_line = now + self._interval
            self._spoken = True
            self._write(f"{self._done} of {self._total}, {_duration(now - self._began)} elapsed")

    def finish(self) -> None:
        """Take the bar away; in plain output say the time that it took, if it was announced at all."""
        if self._bars is not None:
            self._bars.remove_task(self._bar)
        elif self._spoken:
            state = "done" if self._done >= self._total else f"{self._done} of {self._total}"
            self._write(f"{state}, {_duration(self._clock() - self._began)}")

    def _write(self, line: str) -> None:
        print(f"{self._description}: {line}", file=self._stream, flush=True)


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
    stream = stream if stream is not None else sys.stderr
    bars = _bars(stream, clock) if _is_terminal(stream) else None
    if bars is not None:
        bars.start()
    try:
        with _tracking(Tracker(description, total, stream, interval, clock, bars)) as tracker:
            yield tracker
    finally:
        if bars is not None:
            bars.stop()


@contextmanager
def _tracking(tracker: Tracker) -> Iterator[Tracker]:
    try:
        yield tracker
    finally:
        tracker.finish()


class _Remaining:
    """Time left, from the rate of the last minute: a run gets faster as its model shrinks."""

    def __init__(self, total: int, done: int, now: float) -> None:
        self._total = total
        self._seen = deque([(now, done)])
        self.seconds: float | None = None

    def observe(self, done: int, now: float) -> float | None:
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= RATE_WINDOW_SECONDS:
            self._seen.popleft()
        began, before = self._seen[0]
        if now > began and done > before:
            self.seconds = max(self._total - done, 0) * (now - began) / (done - before)
        return self.seconds


class _TimeColumn(ProgressColumn):
    """elapsed < left"""

    def render(self, task: Task) -> Text:
        remaining = task.fields["remaining"]
        left = "" if remaining is None else f" < {_duration(remaining)}"
        return Text(f"{_duration(task.elapsed or 0.0)}{left}", style="dim")


def _bars(stream: TextIO, clock: Clock) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[status]}", markup=False),
        _TimeColumn(),
        console=Console(file=stream, highlight=False),
        expand=True,
        refresh_per_second=4,  # the bar must not take a core from the training that it shows
        get_time=clock,
    )


def _is_terminal(stream: TextIO) -> bool:
    """Whether control codes are welcome; rich alone would write them to a log file when FORCE_COLOR is set."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
