"""Metrics to TensorBoard, Weights & Biases or MLflow as a run goes on. metrics.jsonl stays the source of truth.

A tracker that fails under way (a network that is down) is dropped with one sentence; the run goes on.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientllm.errors import UsageError
from efficientllm.files import read_json, write_json

IDS = "trackers.json"  # of a run folder: the trackers' own names for this run, so that a resumed one goes on in them
# What logs the values of a step, and what ends the tracker. Steps come in order; after a resume the first may be one
# that was logged before.
Tracker = tuple[Callable[[int, dict[str, float]], object], Callable[[], object]]


def _tensorboard(folder: Path, recipe: Mapping[str, Any], step: int) -> Tracker:
    """Event files under RUN/tensorboard: `tensorboard --logdir RUN`."""
    from torch.utils.tensorboard import SummaryWriter

    # Events of steps that the run is going to take again are hidden.
    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(folder: Path, recipe: Mapping[str, Any], step: int) -> Tracker:
    """One run of Weights & Biases for one run folder. Project: WANDB_PROJECT, or efficientllm."""
    import wandb

    known = _ids(folder)
    if "wandb" not in known:
        known["wandb"] = uuid.uuid4().hex[:16]
        write_json(folder / IDS, known)
    project = os.environ.get("WANDB_PROJECT", "efficientllm")
    options: dict[str, Any] = {"name": _name(folder), "id": known["wandb"], "resume": "allow", "dir": str(folder)}
    run: Any = wandb.init(project=project, config=dict(recipe), **options)
    return lambda step, values: run.log(values, step=step), run.finish


def _mlflow(folder: Path, recipe: Mapping[str, Any], step: int) -> Tracker:
    """One MLflow run for one run folder. Server and experiment by MLflow's own environment."""
    import mlflow

    known = _ids(folder)
    run = mlflow.start_run(run_id=known.get("mlflow"), run_name=None if "mlflow" in known else _name(folder))
    if "mlflow" not in known:
        write_json(folder / IDS, known | {"mlflow": run.info.run_id})
        mlflow.log_params({name: str(value)[:500] for name, value in _flat(recipe)})
    return lambda step, values: mlflow.log_metrics(values, step=step), mlflow.end_run


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a tracker whose package, which has its name, is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"run.trackers has {name}, which is not installed: pip install {name}, or leave it out")


class Trackers:
    """All trackers of a run; `log` takes a line of metrics.jsonl."""

    def __init__(self, say: Callable[[str], None] = lambda message: None) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}

    def start(self, names: Sequence[str], folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        """Opens them, or goes on with those of a run that is resumed at `step`."""
        for name in names:
            tracker = self._guarded(name, TRACKERS[name], folder, recipe, step)
            if tracker is not None:
                self._open[name] = tracker

    def log(self, line: Mapping[str, Any]) -> None:
        step = int(line["step"])
        values = {
            name: float(value) for name, value in _flat(line) if isinstance(value, int | float) and name != "step"
        }
        for name, (log, _) in list(self._open.items()):
            self._guarded(name, log, step, dict(values))

    def close(self) -> None:
        for name, (_, close) in list(self._open.items()):
            self._guarded(name, close)
        self._open.clear()

    def _guarded(self, name: str, act: Callable[..., Any], *arguments: Any) -> Any:
        """An error of a tracker closes that tracker, with one sentence; the run goes on."""
        try:
            return act(*arguments)
        except Exception as error:
            self._open.pop(name, None)
            first = str(error).strip().split("\n")[0] or type(error).__name__
            self._say(f"{name} is left out from here on ({first}); metrics.jsonl has everything")


def _name(folder: Path) -> str:
    """The run folder's name; of a comparison's runs, which all have names like seed-0-lr-0.001, with their arm's."""
    parts = folder.resolve().parts[-2:]
    return "/".join(parts) if parts[-1].startswith("seed-") else parts[-1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value


def _ids(folder: Path) -> dict[str, str]:
    return dict(read_json(folder / IDS) or {})
