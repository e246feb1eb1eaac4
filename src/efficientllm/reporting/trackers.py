"""Metrics to TensorBoard, Weights & Biases or MLflow as a run goes on. metrics.jsonl stays the source of truth.

A tracker that fails under way (a network that is down) is dropped with one sentence; the run goes on.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from efficientllm.errors import UsageError
from efficientllm.files import read_json, write_json

IDS = "trackers.json"


class Tracker(Protocol):
    """Where metrics go. Steps come in order; after a resume the first may be one that was logged before."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files under RUN/tensorboard: `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps that the run is going to take again are hidden.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One run of Weights & Biases for one run folder, resumed with it. Project: WANDB_PROJECT, or efficientllm."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        import os

        import wandb

        identity = _identity(folder, "wandb", lambda: uuid.uuid4().hex[:16])
        project = os.environ.get("WANDB_PROJECT", "efficientllm")
        self._run: Any = wandb.init(
            project=project, name=_name(folder), id=identity, resume="allow", dir=str(folder), config=dict(recipe)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflowTracker:
    """One MLflow run for one run folder, resumed with it. Server and experiment by MLflow's own environment."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        import mlflow

        self._client: Any = mlflow
        known = _identity(folder, "mlflow", lambda: "")
        run = mlflow.start_run(run_id=known or None, run_name=None if known else _name(folder))
        if not known:
            _remember(folder, "mlflow", run.info.run_id)
            mlflow.log_params({name: str(value)[:500] for name, value in _flat(recipe)})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._client.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._client.end_run()


TRACKERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], int], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoardTracker),
    "wandb": ("wandb", WandbTracker),
    "mlflow": ("mlflow", MLflowTracker),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise UsageError(f"run.trackers has {name}, which is not installed: pip install {name}, or leave it out")


class Trackers:
    """All trackers of a run; `log` takes a line of metrics.jsonl."""

    def __init__(self, say: Callable[[str], None] = lambda message: None) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}

    def start(self, names: Sequence[str], folder: Path, recipe: Mapping[str, Any], step: int) -> None:
        """Opens them, or goes on with those of a run that is resumed at `step`."""
        for name in names:
            self._guarded(name, lambda name=name: self._open.update({name: TRACKERS[name][1](folder, recipe, step)}))  # type: ignore[misc]

    def log(self, line: Mapping[str, Any]) -> None:
        step = int(line["step"])
        values = {
            name: float(value) for name, value in _flat(line) if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(step, values))  # type: ignore[misc]

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)
        self._open.clear()

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        """An error of a tracker closes that tracker, with one sentence; the run goes on."""
        try:
            act()
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


def _identity(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The tracker's own name for this run, made once and kept in RUN/trackers.json."""
    known = _known(folder).get(name)
    if known:
        return known
    made = make()
    if made:
        _remember(folder, name, made)
    return made


def _remember(folder: Path, name: str, identity: str) -> None:
    write_json(folder / IDS, _known(folder) | {name: identity})


def _known(folder: Path) -> dict[str, str]:
    return dict(read_json(folder / IDS) or {})
