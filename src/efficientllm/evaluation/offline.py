"""The harness's own tasks on local records: only the place that their data comes from is replaced.

    DIR/<hub id>/<configuration, or default>/<split>.jsonl        one JSON object a line, fields named as on the hub

A data set whose configurations share a file with a column `subject` (MMLU) may lie under `all`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from efficientllm.errors import UsageError


def local_dataset(root: Path, path: str, name: str | None) -> DatasetDict:
    """All splits of one data set (hub id `path`, configuration `name`). Raises UsageError where there is nothing."""
    folder = folder_of(root, path, name)
    subject = name if folder.name == "all" and name != "all" else None
    splits = {file.stem: _records(file, subject) for file in sorted(folder.glob("*.jsonl"))}
    splits = {split: records for split, records in splits.items() if records}
    if not splits:
        raise UsageError(
            f"{folder} has no records: put them there as <split>.jsonl with the hub's field names, or leave the task "
            "out"
        )
    return DatasetDict({split: Dataset.from_list(records) for split, records in splits.items()})


def folder_of(root: Path, path: str, name: str | None) -> Path:
    """Where the records of a data set lie: its configuration's folder, or the one that all of them share."""
    own, shared = root / path / (name or "default"), root / path / "all"
    return own if own.is_dir() or not shared.is_dir() else shared


def with_all_splits(found: DatasetDict, config: Any, folder: Path) -> DatasetDict:
    """The splits that a task names, where only the one that it is measured on has to be there; others, which serve
    few-shot examples alone, are empty. Raises UsageError where that one is missing."""
    measured = _measured(config)
    if measured not in found:
        raise UsageError(f"{folder} has no {measured}.jsonl, which {config.task} is measured on: add it")
    empty = found[measured].select([])
    named = (config.training_split, config.validation_split, config.test_split, config.fewshot_split)
    return DatasetDict(dict.fromkeys((split for split in named if split), empty) | dict(found))


def _measured(config: Any) -> str:
    return str(config.test_split or config.validation_split)


def _records(file: Path, subject: str | None) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON lines: {error}") from error
    return [record for record in records if subject is None or record.get("subject") == subject]


def check_folder(root: Path | None) -> None:
    if root is not None and not root.is_dir():
        raise UsageError(f"--data-dir {root} is no folder: give one with <hub id>/<configuration>/<split>.jsonl in it")


@contextmanager
def local_data(root: Path | None) -> Iterator[list[Path]]:
    """While it lasts, the harness's tasks take their data from `root`; None: from the hub, as they come.

    The list grows by every file that a task is measured on.
    """
    from lm_eval.api.task import ConfigurableTask

    read: list[Path] = []
    if root is None:
        yield read
        return
    check_folder(root)
    original = ConfigurableTask.download

    def download(self: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        folder = folder_of(root, self.DATASET_PATH, self.DATASET_NAME)
        read.append(folder / f"{_measured(self.config)}.jsonl")
        found = local_dataset(root, self.DATASET_PATH, self.DATASET_NAME)
        self.dataset = with_all_splits(found, self.config, folder)

    ConfigurableTask.download = download
    try:
        yield read
    finally:
        ConfigurableTask.download = original
