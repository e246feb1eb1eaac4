"""The folder of a run: what lies where, who may write there, and whether a recipe belongs to it.

config.yaml        the resolved recipe           metrics.jsonl      a record a step, or 10,000 spread over the run
source.json        what the source is            events.jsonl       a record a pruning event
checkpoints/       snapshots to resume from      compactions.jsonl  a record a change of shape
ladder/SIZE/       a snapshot and its model      tensorboard/ ...   what trackers write
model/             the result                    summary.json       what came of it; its presence means finished

run.png, report.html, report/ and samples.json are made of these afterwards, and may be made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from efficientllm.checkpoint.store import checkpoints
from efficientllm.config import Recipe, dump_recipe, without_gone
from efficientllm.config.reference import free_keys
from efficientllm.errors import UsageError
from efficientllm.files import locked, read_json, write_atomically
from efficientllm.reporting.journal import Journal

# Of the run section only validation_tokens is bound: the source was measured on those rows; where it is auto, it
# follows from validate_every, which then is bound too. docs/distributed.md has the list too.
FREE_KEYS = free_keys()


class OlderRun(UsageError):
    """A run folder that another version has begun, with a recipe that this one does not take."""


class RunFolder:
    """writes: whether this process leaves anything here; of several processes only the leading one does."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.source = self.path / "source.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.ladder = self.path / "ladder"
        self.summary = self.path / "summary.json"
        self.metrics = Journal(self.path / "metrics.jsonl", writes=writes)
        self.events = Journal(self.path / "events.jsonl", writes=writes)
        self.compactions = Journal(self.path / "compactions.jsonl", writes=writes)

    @property
    def journals(self) -> tuple[Journal, Journal, Journal]:
        return self.metrics, self.events, self.compactions

    def rewind(self, step: int) -> None:
        """Takes all journals back to a step."""
        for journal in self.journals:
            journal.rewind(step)

    def sync(self) -> None:
        """Forces all journals to the disk."""
        for journal in self.journals:
            journal.sync()

    def take_over(self, other: RunFolder) -> None:
        """Writes another run's facts of its source and its journals here, in place of what there is."""
        try:
            for mine, theirs in zip(self.journals, other.journals, strict=True):
                if theirs.path.is_file():
                    write_atomically(mine.path, theirs.path.read_bytes())
                else:
                    mine.path.unlink(missing_ok=True)
            write_atomically(self.source, other.source.read_bytes())
        except OSError as error:
            raise UsageError(f"cannot copy the journals of {other.path} to {self.path} ({error})") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes off this folder. Raises UsageError when one is at work in it."""

        def busy() -> None:
            raise UsageError(
                f"another process is working on run folder {self.path}; wait for it, or choose another run.dir"
            )

        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / ".lock", busy))
            except OSError as error:
                raise UsageError(
                    f"cannot write to run folder {self.path} ({error.strerror}); choose another run.dir"
                ) from error
            yield

    @property
    def begun(self) -> bool:
        """Whether there is anything of a run to go on from, or to read."""
        left = self.summary.is_file() or bool(checkpoints(self.checkpoints)) or self.ladder.is_dir()
        return self.config.is_file() and left

    def difference(self, recipe: Recipe) -> tuple[str, Any, Any] | None:
        """The first essential key, with both values, in which the run begun here differs from a recipe; None where none
        does or nothing was begun. Writes nothing. Raises UsageError where config.yaml is damaged, and OlderRun where it
        is a recipe no longer."""
        if not self.begun:
            return None
        try:
            # Through Recipe, so that a key which a newer version has added or dropped counts with its default.
            there = Recipe.model_validate(without_gone(yaml.safe_load(self.config.read_text())))
            old, new = _essential(there), _essential(recipe)
            if there.run.validation_tokens != recipe.run.validation_tokens:
                for each in (old, new):  # that number is what differs, not the pace that follows from it
                    each["run"].pop("validate_every", None)
            return first_difference(old, new)
        except UsageError as error:
            saved = checkpoints(self.checkpoints)
            on = f", with resume={saved[-1]} to go on from there" if saved else ""
            raise OlderRun(
                f"run folder {self.path} was begun by another version: {error}; choose another run.dir{on}"
            ) from error
        except (OSError, yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
            raise UsageError(f"{self.config} is damaged; restore it or choose another run.dir") from error

    def check(self, recipe: Recipe) -> None:
        """Raises UsageError naming the first key in which a recipe differs from the run begun here. Writes nothing."""
        difference = self.difference(recipe)
        if difference is None:
            return
        key, old, new = difference
        if key == "train.batch_tokens" and old != new:
            rows = old // recipe.data.sequence_length
            raise UsageError(
                f"run folder {self.path} was begun with {rows} rows in a step; choose a train.micro_batch that "
                f"divides {rows} and train.batch_tokens as it was, or another run.dir"
            )
        raise UsageError(
            f"run folder {self.path} belongs to a recipe with {key}={old}, not {new}; set it back, or choose "
            "another run.dir"
        )

    def adopt(self, recipe: Recipe) -> None:
        """Writes config.yaml, once `check` has found nothing against it."""
        self.check(recipe)
        write_atomically(self.config, dump_recipe(recipe).encode())

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """A JSON file of the run folder; None where there is none. Raises UsageError where it is damaged."""
        mend = "restore it, or choose another run.dir (a summary.json may simply be deleted)"
        content: dict[str, Any] | None = read_json(path, mend)
        return content


def fingerprint(recipe: Recipe) -> str:
    """Eight hexadecimal digits that two recipes share where a run of the one may go on as a run of the other."""
    return hashlib.sha256(json.dumps(_essential(recipe), sort_keys=True).encode()).hexdigest()[:8]


def _essential(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the keys that may change between resumes; batch_tokens as micro_batch rounds it."""
    content: dict[str, Any] = yaml.safe_load(dump_recipe(recipe))
    kept = {
        section: {key: value for key, value in values.items() if key not in FREE_KEYS.get(section, ())}
        if isinstance(values, dict)
        else values
        for section, values in content.items()
    }
    length = recipe.data.sequence_length
    if recipe.run.validation_tokens == "auto":
        kept["run"]["validate_every"] = content["run"]["validate_every"]
    kept["train"]["batch_tokens"] = recipe.train.batch_rows(length) * length
    return kept


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two nested mappings differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if old == new else (key, old, new)
