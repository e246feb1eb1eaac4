"""Append-only JSON lines: metrics.jsonl, events.jsonl and compactions.jsonl of a run folder.

A record is one JSON object on one line. NaN and infinities are written as null, because JSON has no words for them
and a reader in another language must not choke on a diverged run.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientllm.errors import UsageError
from efficientllm.files import flush, refused, write_atomically


class Journal:
    """A file of JSON lines that survives being killed at any byte.

    The file and its folder are made by the first `append`. Only one process may write a journal; with `writes` False
    nothing is ever written.
    """

    def __init__(self, path: Path | str, *, writes: bool = True) -> None:
        self.path = Path(path)
        self._writes = writes
        self._tail_is_whole = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write `record` as one line and hand it to the operating system before returning.

        Raises UsageError when the disk refuses the line, TypeError when a value is not JSON.
        """
        if not self._writes:
            return
        line = json.dumps(without_nonfinite(record), allow_nan=False, separators=(",", ":")) + "\n"
        try:
            if not self._tail_is_whole:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._rewrite(None)  # a line appended behind a torn one would make both unreadable
            with self.path.open("ab") as file:
                file.write(line.encode())
            self._tail_is_whole = True
        except OSError as error:
            self._tail_is_whole = False
            raise refused(self.path, error) from error

    def rewind(self, step: int) -> None:
        """Drop every record whose "step" is greater than `step`, and a torn last line; keep the rest bit for bit.

        With a checkpoint of `step`, the journal then holds what an uninterrupted run had written by that step.
        The file is replaced atomically, and left alone when there is nothing to drop.
        Raises UsageError for a line that is torn elsewhere or has no whole "step".
        """
        if self._writes:
            self._rewrite(step)
            self._tail_is_whole = True

    def sync(self) -> None:
        """Force what was appended to the disk; call it before a checkpoint that stands for these records."""
        try:
            if self._writes and self.path.exists():
                flush(self.path)
        except OSError as error:
            raise refused(self.path, error) from error

    def _rewrite(self, step: int | None) -> None:
        if not self.path.exists():
            return
        kept = []
        for number, (line, record) in enumerate(_lines(self.path), start=1):
            if step is not None and _step(record, self.path, number) > step:
                continue
            kept.append(line)
        whole = b"".join(line + b"\n" for line in kept)
        if whole != self.path.read_bytes():
            write_atomically(self.path, whole)


def read_journal(path: Path | str) -> list[dict[str, Any]]:
    """Return the records of a journal in the order of writing; a missing file has none.

    A torn last line (the process died while writing it) is left out. Raises UsageError, with the file and the line,
    for a line that is torn elsewhere.
    """
    path = Path(path)
    return [record for _, record in _lines(path)] if path.exists() else []


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return (line without its newline, record) of every whole line."""
    try:
        lines = parsed_lines(path)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): mend its permissions") from error
    for number, (_, record) in enumerate(lines, start=1):
        if record is None:
            raise UsageError(
                f"{path}, line {number}: not a JSON record; the file was damaged after it was written: "
                "take that line out, or restore the file from a copy"
            )
    return [(line, record) for line, record in lines if record is not None]


def parsed_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """(line without its newline, record) of every line, None where it is no JSON object; a torn last one is left out:
    it is being written, or was when the process died. Raises OSError."""
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    parsed = [(line, _record(line)) for line in lines]
    return parsed[:-1] if parsed and parsed[-1][1] is None else parsed


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also UnicodeDecodeError: blocks that never reached the disk read as zeros
        return None
    return record if isinstance(record, dict) else None


def _step(record: Mapping[str, Any], path: Path, number: int) -> int:
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise UsageError(f'{path}, line {number}: the record has no whole "step"; take that line out')
    return step


def without_nonfinite(value: Any) -> Any:
    """The value with null for every number that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return value
