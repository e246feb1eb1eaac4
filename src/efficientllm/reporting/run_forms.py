"""The form of each file of a run folder, in one place: what a report may count on, and reading that skips the rest.

A report is wanted most when a run has gone wrong, so a damaged line or file costs itself and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
WIDTHS = ("layers", "hidden", "heads", "kv_heads", "intermediate")
_AMOUNTS = ("loss", "validation_loss", "live_parameters", "allocated_parameters", "seconds", "tokens_per_second")
_NUMBERS = (*_AMOUNTS, "flops", "allocated_after")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


def is_widths(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(name), int) and value[name] > 0 for name in WIDTHS)


def is_line(record: Any) -> bool:
    """A line of any journal: step and tokens, and whatever else a report reads of it is what it should be."""
    if (
        not isinstance(record, Mapping)
        or not isinstance(record.get("step"), int)
        or not is_number(record.get("tokens"))
    ):
        return False
    numbers = all(_is_number_or_null(record.get(name)) for name in _NUMBERS)
    numbers = numbers and isinstance(record.get("flops_by_part") or {}, Mapping)
    return numbers and ("widths" not in record or is_widths(record["widths"]))


def is_metrics(record: Any) -> bool:
    saliency = (record.get("saliency") or {}) if isinstance(record, Mapping) else None
    return isinstance(saliency, Mapping) and all(map(_is_number_or_null, saliency.values())) and is_line(record)


def is_event(record: Any) -> bool:
    return is_line(record) and "widths" in record and isinstance(record.get("type"), str)


def is_compaction(record: Any) -> bool:
    return is_line(record) and is_widths(record.get("after"))


def is_model(value: Any) -> bool:
    """Facts of a source or of a result."""
    if not isinstance(value, Mapping) or not is_number(value.get("parameters")) or not is_widths(value.get("widths")):
        return False
    return _is_number_or_null(value.get("validation_loss"))


def is_summary(value: Any) -> bool:
    return isinstance(value, Mapping) and is_model(value.get("result")) and is_model(value.get("source"))


def are_samples(value: Any) -> bool:
    def text(sample: Mapping[str, Any], name: str) -> bool:
        return name in sample and (sample[name] is None or isinstance(sample[name], str))

    names = ("prompt", "source", "result")
    return isinstance(value, list) and all(
        isinstance(sample, Mapping) and all(text(sample, name) for name in names) for sample in value
    )


def is_evaluation(value: Any) -> bool:
    results = value.get("results") if isinstance(value, Mapping) else None
    return isinstance(results, Mapping) and all(isinstance(values, Mapping) for values in results.values())


def is_bench(value: Any) -> bool:
    known = isinstance(value, Mapping) and value.keys() >= {"settings", "machine", "models"}
    return known and isinstance(value["settings"], Mapping) and "backend" in value["settings"]


def read_lines(file: Path, fits: Callable[[Any], bool], notes: list[str]) -> list[Record]:
    """The lines of a journal that can be read, and a note that counts the others. A last line without its end is being
    written, or was when the process died: no note of that."""
    try:
        *whole, rest = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{file} cannot be read ({error.strerror})")
        return []
    records = [record for line in whole if fits(record := _parsed(line))]
    left_out = len(whole) - len(records)
    records += [record for record in (_parsed(rest),) if fits(record)]
    if left_out:
        notes.append(f"{file.name}: {left_out} of {len(whole)} lines cannot be read and are left out")
    return records


def read_facts(file: Path, fits: Callable[[Any], bool], notes: list[str]) -> Any:
    """The content of a JSON file; None, and a note, where it cannot be read or is of another form; None without it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file} cannot be read ({error}) and is left out")
        return None
    if not fits(content):
        notes.append(f"{file} is not of the form that efficientllm writes and is left out")
        return None
    return content


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
