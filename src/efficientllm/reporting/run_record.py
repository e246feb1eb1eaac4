"""What a run folder says of itself, as far as it can be read: for reports, also of runs under way or damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from efficientllm.errors import UsageError
from efficientllm.reporting.run_forms import (
    BENCH,
    COMPACTION,
    EVALUATION,
    EVENT,
    METRICS,
    MODEL,
    SAMPLES,
    SUMMARY,
    Record,
    read_facts,
    read_lines,
)


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


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Raises UsageError for a folder that holds no run."""
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise UsageError(
            f"{path} is no run folder: it has neither config.yaml nor metrics.jsonl; name the run.dir of a run"
        )
    notes: list[str] = []
    metrics = read_lines(path / "metrics.jsonl", METRICS, notes)
    summary = read_facts(path / "summary.json", SUMMARY, notes)
    if not metrics and not notes:
        notes.append("no step has been recorded yet")
    elif not (path / "summary.json").is_file():
        notes.append("the run has not finished: what follows is its state when this page was written")
    return RunRecord(
        path=path,
        name=name or path.resolve().name,
        metrics=metrics,
        events=read_lines(path / "events.jsonl", EVENT, notes),
        compactions=read_lines(path / "compactions.jsonl", COMPACTION, notes),
        source=read_facts(path / "source.json", MODEL, notes) or (summary or {}).get("source"),
        summary=summary,
        recipe=_text(path / "config.yaml"),
        samples=read_facts(path / "samples.json", SAMPLES, notes) or [],
        evaluation=read_facts(path / "eval" / "results.json", EVALUATION, notes),
        bench=[each for file in sorted((path / "bench").glob("*.json")) if (each := read_facts(file, BENCH, notes))],
        notes=notes,
    )


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
