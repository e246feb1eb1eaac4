"""What a run folder says of itself, as far as it can be read: for reports, also of runs under way or damaged.

The form of each file says what a report may count on. A report is wanted most when a run has gone wrong, so a damaged
line or file costs itself and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PositiveInt, TypeAdapter, create_model

from efficientllm.errors import UsageError
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.journal import parsed_lines
from efficientllm.reporting.tables import EXPERT_LABELS, WIDTH_LABELS

Record = Mapping[str, Any]


def _form(**fields: Any) -> Any:
    """Of a JSON object: name -> (type, ... where the field must be there, else its default). Further fields may
    stand in it. Numbers that are not finite are written as null."""
    return create_model("Form", __config__=ConfigDict(extra="allow", strict=True), **fields)


_NUMBER = (float | None, None)
_AMOUNTS = (
    "loss",
    "validation_loss",
    "validation_bits_per_byte",
    "live_parameters",
    "allocated_parameters",
    "seconds",
    "tokens_per_second",
)
_LINE = {"step": (int, ...), "tokens": (float, ...), **dict.fromkeys((*_AMOUNTS, "flops", "allocated_after"), _NUMBER)}
_WIDTHS = _form(
    **dict.fromkeys((name for name in WIDTH_LABELS if name != "intermediate"), (PositiveInt, ...)),
    **dict.fromkeys(("intermediate", *EXPERT_LABELS), (PositiveInt | None, None)),
)
METRICS = _form(
    **_LINE,
    widths=(_WIDTHS, None),
    saliency=(dict[str, float | None] | None, None),
    flops_by_part=(dict[str, Any] | None, None),
)
EVENT = _form(**_LINE, type=(str, ...), widths=(_WIDTHS, ...))
COMPACTION = _form(**_LINE, after=(_WIDTHS, ...))
MODEL = _form(
    parameters=(float, ...),
    widths=(_WIDTHS, ...),
    validation_loss=_NUMBER,
    validation_bits_per_byte=_NUMBER,
    vocabulary=(int | None, None),
)
SUMMARY = _form(source=(MODEL, ...), result=(MODEL, ...))
SAMPLES = list[_form(**dict.fromkeys(("prompt", "source", "result"), (str | None, ...)))]  # type: ignore[misc, valid-type]
EVALUATION = _form(results=(dict[str, dict[str, Any]], ...))
BENCH = _form(settings=(_form(backend=(str, ...)), ...), machine=(Any, ...), models=(Any, ...))


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
    def source_widths(self) -> Widths | None:
        return Widths(**self.source["widths"]) if self.source else None


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Raises UsageError for a folder that holds no run."""
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise UsageError(
            f"{path} is no run folder: it has neither config.yaml nor metrics.jsonl; name the run.dir of a run"
        )
    notes: list[str] = []
    metrics = _lines(path / "metrics.jsonl", METRICS, notes)
    summary = _object(path / "summary.json", SUMMARY, notes)
    if not metrics and not notes:
        notes.append("no step has been recorded yet")
    elif not (path / "summary.json").is_file():
        notes.append("the run has not finished: what follows is its state when this page was written")
    return RunRecord(
        path=path,
        name=name or path.resolve().name,
        metrics=metrics,
        events=_lines(path / "events.jsonl", EVENT, notes),
        compactions=_lines(path / "compactions.jsonl", COMPACTION, notes),
        source=_object(path / "source.json", MODEL, notes) or (summary or {}).get("source"),
        summary=summary,
        recipe=_text(path / "config.yaml"),
        samples=_object(path / "samples.json", SAMPLES, notes) or [],
        evaluation=_object(path / "eval" / "results.json", EVALUATION, notes),
        bench=[each for file in sorted((path / "bench").glob("*.json")) if (each := _object(file, BENCH, notes))],
        notes=notes,
    )


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _lines(file: Path, form: Any, notes: list[str]) -> list[Record]:
    """The lines of a journal that can be read, and a note that counts the others."""
    try:
        lines = parsed_lines(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{file} cannot be read ({error.strerror})")
        return []
    records: list[Record] = [record for _, record in lines if record is not None and _fits(record, form)]
    if len(records) < len(lines):
        left_out = len(lines) - len(records)
        notes.append(f"{file.name}: {left_out} of {len(lines)} lines cannot be read and are left out")
    return records


def _object(file: Path, form: Any, notes: list[str]) -> Any:
    """The content of a JSON file; None, and a note, where it cannot be read or is of another form; None without it."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file} cannot be read ({error}) and is left out")
        return None
    if _fits(content, form):
        return content
    notes.append(f"{file} is not of the form that efficientllm writes and is left out")
    return None


def _fits(content: Any, form: Any) -> bool:
    try:
        TypeAdapter(form).validate_python(content)
    except ValueError:
        return False
    return True
