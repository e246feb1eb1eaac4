"""What a run folder says of itself, as far as it can be read: for reports, also of runs under way or damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientllm.errors import UsageError
from efficientllm.reporting.journal import read_journal

Record = Mapping[str, Any]


@dataclass
class RunRecord:
    """A run's journals and facts. notes: a sentence for everything that is missing or cannot be read."""

    path: Path
    name: str
    metrics: list[Record]
    events: list[Record]
    compactions: list[Record]
    source: Record | None
    summary: Record | None
    recipe: str | None
    samples: list[Record]
    evaluation: Record | None
    bench: list[Record] = field(default_factory=list)  # of each backend, what `efficientllm bench` has left
    notes: list[str] = field(default_factory=list)

    @property
    def source_widths(self) -> dict[str, int] | None:
        return dict(self.source["widths"]) if self.source else None


def _measured(content: Any) -> bool:
    return isinstance(content, dict) and content.keys() >= {"settings", "machine", "models"}


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Raises UsageError for a folder that holds no run."""
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise UsageError(
            f"{path} is no run folder: it has neither config.yaml nor metrics.jsonl; name the run.dir of a run"
        )
    notes: list[str] = []

    def journal(kind: str) -> list[Record]:
        try:
            return [line for line in read_journal(path / f"{kind}.jsonl") if "tokens" in line and "step" in line]
        except UsageError as error:
            notes.append(str(error))
            return []

    def facts(file: str) -> Any:
        try:
            return json.loads((path / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            notes.append(f"{path / file} cannot be read ({error})")
            return None

    metrics = journal("metrics")
    summary, source = facts("summary.json"), facts("source.json")
    if not metrics:
        notes.append("no step has been recorded yet")
    elif summary is None:
        notes.append("the run has not finished: what follows is its state when this page was written")
    config = path / "config.yaml"
    recipe = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
    return RunRecord(
        path,
        name or path.resolve().name,
        metrics,
        journal("events"),
        journal("compactions"),
        source or (summary or {}).get("source"),
        summary,
        recipe,
        facts("samples.json") or [],
        facts("eval/results.json"),
        [found for file in sorted((path / "bench").glob("*.json")) if _measured(found := facts(f"bench/{file.name}"))],
        notes,
    )
