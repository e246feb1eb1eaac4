"""Records of JSON and text files, read one by one, packed or not; long ones in pieces; and what is said of files that
cannot be read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from efficientllm.errors import UsageError

PACKED = {".gz": "gzip", ".zst": "zstd"}
TEXT_COLUMN, CHAT_COLUMN, TOKEN_COLUMN = "text", "messages", "input_ids"
_PIECE_CHARS = 1 << 20  # a tokenizer needs about 100 bytes of memory per token while it works


def documents(files: Sequence[str], kind: str, column: str, chat: bool = False) -> Iterator[dict[str, str | None]]:
    """The records {"text": ...} of JSON or text files; chat: of conversations, as JSON. Raises UsageError, naming file
    and line, for a bad one."""
    for file in files:
        with readable(Path(file)), _opened(Path(file)) as stream:
            if kind == "text":
                yield {TEXT_COLUMN: stream.read()}
                continue
            for place, record in _json_records(stream, file):
                if not isinstance(record, dict):
                    raise UsageError(f"{place} is no JSON object with a column '{column}'; mend or remove it")
                if column not in record:
                    raise no_column(place, column, list(record))
                text = record[column]
                if chat and isinstance(text, list):
                    text = json.dumps(text)
                elif text is not None and (chat or not isinstance(text, str)):
                    raise no_text(place, column, type(text).__name__, "a conversation" if chat else "text")
                yield {TEXT_COLUMN: text and _encodable(text)}


def objects(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The records of JSON files, up to the first that is no object."""
    for file in files:
        with readable(file), _opened(file) as stream:
            for _, record in _json_records(stream, str(file)):
                if not isinstance(record, dict):
                    return
                yield record


def _json_records(stream: TextIO, file: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, record) of JSON lines, or of one array of records."""
    first = True
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        place = f"{file}, line {number}"
        array, first = first and line.lstrip().startswith("["), False
        try:
            value = json.loads(line + stream.read() if array else line)
        except ValueError as error:
            raise UsageError(f"{place}: not valid JSON ({error}); write one JSON object per line") from error
        if not array:
            yield place, value
            continue
        yield from ((f"{file}, record {index}", record) for index, record in enumerate(value, start=1))


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no UTF-8 can hold: it becomes a question mark."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def pieces(text: str, limit: int = _PIECE_CHARS) -> Iterator[str]:
    """A text in order, in pieces of at most `limit` characters, cut after a line or before a space where there is one.

    Only a text of over a million characters is cut; at a cut its tokens may differ from those of the text in one go.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, start + limit)
        if end <= start:
            end = start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _opened(path: Path) -> TextIO:
    packing = PACKED.get(path.suffix)
    raw = pa.input_stream(str(path), compression=packing)  # reports a stream that was cut short
    return io.TextIOWrapper(raw, encoding="utf-8-sig")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what a damaged or forbidden file raises into a UsageError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = str(error).split("\n", 1)[0]
        raise UsageError(f"'{path}' cannot be read ({reason}); replace the file or leave it out") from error


def no_column(where: str, column: str, columns: Sequence[str]) -> UsageError:
    return UsageError(
        f"{where}: no column '{column}', but {', '.join(columns)}; set text_column of that source to the one with text"
    )


def no_text(where: str, column: str, kind: str, wanted: str = "text") -> UsageError:
    return UsageError(
        f"{where}: column '{column}' holds {kind}, not {wanted}; set text_column of that source to one that does"
    )


def no_documents(name: str) -> UsageError:
    return UsageError(f"'{name}' holds no text: there is no document in it, or all are empty; add text")
