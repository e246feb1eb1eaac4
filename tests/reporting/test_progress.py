import io
import re

import pytest

from efficientllm.reporting.progress import RunProgress, track, tracked


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # it must not bring control codes into a log file


def test_plain_output_is_throttled_complete_and_free_of_control_codes(clock: Clock) -> None:
    stream = io.StringIO()
    with RunProgress(3_000_000, description="prune", stream=stream, interval=10.0, clock=clock) as progress:
        for step in range(1, 31):  # 30 steps of one second
            clock.now += 1.0
            progress.update(step * 100_000, loss=4.0 - step / 100, live=2_160_000, tokens_per_second=100_000.0)
            if step == 15:
                progress.note("compacted 2.2M to 1.9M")
    text = stream.getvalue()
    assert re.fullmatch(r"[\x20-\x7e\n]*", text)
    lines = text.splitlines()
    assert lines.pop(2) == "compacted 2.2M to 1.9M"
    # the first update, then one in ten seconds, then the end
    assert [int(re.findall(r"(\d+)%", line)[0]) for line in lines] == [3, 37, 70, 100]
    assert "loss 3.890" in lines[1]
    assert "0:00:11 elapsed, 0:00:19 left" in lines[1]
    assert "2.16M live" in lines[1]
    assert "100K tok/s" in lines[1]
    assert "loss 3.700" in lines[3]
    assert "left" not in lines[3]


def test_a_resumed_or_interrupted_run_tells_the_truth(clock: Clock) -> None:
    """Tokens of the run before do not count as speed; an interruption still says how far the run came."""
    stream = io.StringIO()

    def run() -> None:
        with RunProgress(1000, start=900, stream=stream, clock=clock) as progress:
            for tokens in (920, 940):
                clock.now += 2.0
                progress.update(tokens)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    first, last = stream.getvalue().splitlines()
    assert "0:00:08 left" in first
    assert last.startswith("train: 94%")


def test_time_left_follows_a_run_that_gets_faster(clock: Clock) -> None:
    stream = io.StringIO()
    with RunProgress(100_000, stream=stream, interval=0.0, clock=clock) as progress:
        for _ in range(100):
            clock.now += 1.0
            progress.update(progress_tokens := int(100 * (clock.now - 100.0)))
        for _ in range(61):
            clock.now += 1.0
            progress_tokens += 1000
            progress.update(progress_tokens)
    assert "0:00:29 left" in stream.getvalue().splitlines()[-1]


def test_terminal_shows_a_bar_with_every_value(clock: Clock) -> None:
    stream = Terminal()
    with RunProgress(1000, description="prune [x]", stream=stream, clock=clock) as progress:
        clock.now += 1.0
        progress.update(100)
        clock.now += 4.0
        progress.update(500, loss=3.2, live=469_100_000, tokens_per_second=12_300.0)
        progress.note("compacted [bold]")
        with progress.track("validate", 4) as tracker:
            tracker.advance(2)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    final = text.rstrip("\n").splitlines()[-1]
    for shown in ("prune [x]", "50%", "loss 3.200", "469.1M live", "12.3K tok/s", "0:00:05 < 0:00:05"):
        assert shown in final
    assert "\x1b[" in stream.getvalue()
    assert "compacted [bold]" in text
    assert "validate" not in final  # side work leaves no trace


def test_dumb_terminal_gets_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with RunProgress(10, stream=stream, clock=clock) as progress:
        progress.update(10)
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "spoken"), [(0.1, []), (1.0, ["export: 2 of 4", "export: done, 0:00:04"])])
def test_side_work_is_announced_only_when_it_is_long(clock: Clock, seconds: float, spoken: list[str]) -> None:
    stream = io.StringIO()
    with track("export", 4, stream=stream, clock=clock) as tracker:
        for _ in range(4):
            clock.now += seconds
            tracker.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(spoken)
    assert all(line.startswith(start) for line, start in zip(lines, spoken, strict=True))


def test_empty_work_does_not_divide_by_zero(clock: Clock) -> None:
    stream = io.StringIO()
    with RunProgress(0, stream=stream, clock=clock) as progress, progress.track("validate", 0):
        progress.update(0)
    assert "100%" in stream.getvalue()


def test_a_bar_over_items_goes_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(ZeroDivisionError), tracked("bench", [1, 0]) as items:
        assert [1 // item for item in items]
    ended = stream.getvalue()
    assert ended.count("\x1b[?25l") == ended.count("\x1b[?25h") == 1  # the cursor is hidden while it lasts
