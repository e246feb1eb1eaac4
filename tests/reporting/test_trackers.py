"""Trackers: what a run sends, how a resumed one goes on, and that none of them can stop a run."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import World
from efficientllm.cli import main
from efficientllm.reporting.journal import read_journal
from efficientllm.reporting.trackers import Trackers


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


def test_tensorboard_holds_what_metrics_hold(world: World) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert call("prune", world.write("tracked", run={"trackers": ["tensorboard"]})) == 0
    folder = world.folder / "runs" / "tracked"
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    lines = read_journal(folder / "metrics.jsonl")
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]
    assert {"validation_loss", "lr", "live_parameters", "widths/hidden", "saliency/ffn"} <= set(
        events.Tags()["scalars"]
    )


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.lines: list[tuple[int, Mapping[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        return self

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1


class FakeMLflow(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.started: list[str | None] = []
        self.names: list[str | None] = []
        self.lines: list[tuple[int, Mapping[str, float]]] = []
        self.params: dict[str, str] = {}

    def start_run(self, run_id: str | None, run_name: str | None) -> Any:
        self.started.append(run_id)
        self.names.append(run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "made-by-the-server"))

    def log_params(self, values: dict[str, str]) -> None:
        self.params |= values

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.lines.append((step, values))

    def end_run(self) -> None:
        self.started.append("ended")


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = FakeWandb(), FakeMLflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    recipe = {"train": {"lr": 0.1}}
    for step in (0, 5):
        trackers = Trackers()
        trackers.start(["wandb", "mlflow"], tmp_path, recipe, step)
        trackers.log({"step": step + 1, "loss": 2.0, "saliency": {"ffn": 0.5}, "validation_loss": None})
        trackers.close()
    first, second = wandb.inits
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["config"] == recipe
    assert wandb.lines == mlflow.lines == [(step, {"loss": 2.0, "saliency/ffn": 0.5}) for step in (1, 6)]
    assert mlflow.started == [None, "ended", "made-by-the-server", "ended"]
    assert mlflow.params == {"train/lr": "0.1"}
    assert wandb.finished == 2


def test_runs_of_a_comparison_are_told_apart_by_their_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = FakeWandb(), FakeMLflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for folder in ("tokens/random/seed-0-lr-0.001", "tokens/efficientllm/seed-0-lr-0.001", "books"):
        (tmp_path / folder).mkdir(parents=True)
        trackers = Trackers()
        trackers.start(["wandb", "mlflow"], tmp_path / folder, {}, 0)
        trackers.close()
    names = ["random/seed-0-lr-0.001", "efficientllm/seed-0-lr-0.001", "books"]
    assert [each["name"] for each in wandb.inits] == mlflow.names == names


def test_a_tracker_that_fails_never_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, said = FakeWandb(), []

    def fail(values: Mapping[str, float], step: int) -> None:
        raise ConnectionError("the network is down\nand more")

    monkeypatch.setattr(wandb, "log", fail, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = Trackers(said.append)
    trackers.start(["wandb"], tmp_path, {}, 0)
    for step in (1, 2):
        trackers.log({"step": step, "loss": 1.0})
    trackers.close()
    assert said == ["wandb is left out from here on (the network is down); metrics.jsonl has everything"]


def test_what_is_not_there_is_said_before_training(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", world.write("untracked", run={"trackers": ["mlflow"]})) == 2
    assert "mlflow, which is not installed" in capsys.readouterr().err
    assert call("prune", world.write("unknown", run={"trackers": ["tensorbord"]})) == 2
    assert "tensorboard" in capsys.readouterr().err
    assert not (world.folder / "runs" / "untracked" / "metrics.jsonl").exists()
