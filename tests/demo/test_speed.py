"""The demo's two speeds, against a clock of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficientllm.demo import speed


def test_training_is_timed_after_the_last_event(tmp_path: Path) -> None:
    lines = [
        {"step": step, "seconds": seconds, "tokens_per_second": 100 / seconds}
        for step, seconds in enumerate([9.0, 8.0, 2.0, 3.0])
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert speed.speed_once_pruned(tmp_path) is None
    events = tmp_path / "events.jsonl"
    events.write_text('{"step": 0}\n{"step": 1}\n')
    assert speed.speed_once_pruned(tmp_path) == pytest.approx(200 / 5.0)
    events.write_text('{"step": 3}\n')
    assert speed.speed_once_pruned(tmp_path) is None


def test_models_take_turns_and_the_median_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns = [0.0], []

    class Model:
        """Takes as long as its name says; in its first pass and in one other a hundred times that."""

        def __init__(self, path: str) -> None:
            self.seconds, self.passes = float(path), 0

        def eval(self) -> Model:
            return self

        def __call__(self, **inputs: object) -> None:
            turns.append(self.seconds)
            now[0] += self.seconds * (100.0 if self.passes in (0, 4) else 1.0)
            self.passes += 1

    monkeypatch.setattr(speed, "load_model", Model)
    found = speed.forward_speeds({"one": Path("2"), "two": Path("5")}, 4, 25, lambda: now[0])
    assert found == {"one": 50.0, "two": 20.0}
    assert turns == [2.0, 5.0] * (speed.ROUNDS + 1)
