"""Reading a source into one column of texts or conversations, and what its column holds.

The column is text_column, and where that is left at `text` and there is none, `messages` or `input_ids`. What it holds
decides how it is read: texts; conversations, lists of messages with role and content; documents in token ids.
"""

from __future__ import annotations

import errno
import glob
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset, load_from_disk

from efficientllm.data.documents import (
    CHAT_COLUMN,
    TEXT_COLUMN,
    TOKEN_COLUMN,
    documents,
    no_column,
    no_documents,
    no_text,
    objects,
    readable,
)
from efficientllm.data.locating import Content, Located
from efficientllm.errors import UsageError

_PROCESS_BYTES = 32 << 20
_LOOKED_AT = 256  # records of JSON, for the first whose column is not null
_CALLED: dict[Content, str] = {"text": "text", "chat": "conversations", "tokens": "token ids"}


def resolved(located: Located) -> Located:
    """With the column that is read, and what it holds. Raises UsageError where it holds nothing that can be used."""
    if located.kind in ("text", "megatron"):
        return located
    if located.kind == "json":
        records = islice(objects(located.paths), _LOOKED_AT)
        first = next(records, None)
        if first is None:
            return located
        column = _chosen(located, first)
        held = (record.get(column) for record in chain([first], records))
        value = next((each for each in held if each is not None), None)
        chat = isinstance(value, list) and all(isinstance(each, dict) for each in value)
        return replace(located, column=column, content="chat" if chat and column != TEXT_COLUMN else "text")
    schema, where = _schema(located)
    column = _chosen(located, schema)
    if column not in schema:
        raise no_column(where, column, list(schema))
    return replace(located, column=column, content=_content(where, column, schema[column]))


def _chosen(located: Located, there: Mapping[str, Any]) -> str:
    """The column to read of those that there are."""
    others = (CHAT_COLUMN, TOKEN_COLUMN) if located.column == TEXT_COLUMN else ()
    return next((name for name in (located.column, *others) if name in there), located.column)


def _schema(located: Located) -> tuple[dict[str, pa.DataType], str]:
    """Types of the columns, and of what."""
    if located.kind == "parquet":
        with readable(located.paths[0]):
            schema, where = pq.read_schema(located.paths[0]), str(located.paths[0])
    else:
        records = load_from_hub(located) if located.kind == "hub" else opened(located, located.paths[0])
        schema, where = records.data.schema, located.name
    return dict(zip(schema.names, schema.types, strict=True)), where


def _content(where: str, column: str, kind: pa.DataType) -> Content:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if lists and column != TEXT_COLUMN:
        if pa.types.is_integer(kind.value_type):
            return "tokens"
        if pa.types.is_struct(kind.value_type):
            return "chat"
    raise no_text(where, column, str(kind))


def read(located: Located, folder: Path, workers: int) -> Dataset:
    """The texts or conversations of a source as a memory-mapped data set of one column; conversations in JSON as text.
    What has to be unpacked goes under `folder`.

    Raises UsageError for files that cannot be read and columns that are missing or hold no text.
    """
    if located.kind in ("json", "text"):
        return _read_documents(located, folder, workers)
    if located.kind == "hub":
        texts = load_from_hub(located)
    elif located.kind == "parquet":
        texts = _read_parquet(located, folder, workers)
    else:
        texts = _read_arrow(located)
    if located.column not in texts.column_names:
        raise no_column(located.name, located.column, texts.column_names)
    _check(located, located.name, texts.data.schema.field(located.column).type)
    return texts.select_columns([located.column])


def load_from_hub(located: Located) -> Dataset:
    """A hub data set, from the local cache of `datasets` if it is there. Never runs code from the hub."""
    source = located.source
    code: dict[str, Any] = {"trust_remote_code": False}  # datasets < 4 may otherwise ask
    options = code if "trust_remote_code" in inspect.signature(load_dataset).parameters else {}
    try:
        return load_dataset(source.place, source.name, split=source.split or "train", **options)
    except Exception as error:
        if disk_full(error):
            raise UsageError(
                f"the disk is full while '{located.name}' is fetched from the hub; free some space, or set HF_HOME to "
                "a folder on a larger disk"
            ) from error
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise UsageError(
            f"'{located.name}' is no path here, and reading it from the hub failed ({reason}); mend the path, "
            "or check the id, its name and split, the connection and `hf auth login`"
        ) from error


def _read_parquet(located: Located, folder: Path, workers: int) -> Dataset:
    records = 0
    for path in located.paths:
        with readable(path):
            metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        records += metadata.num_rows
        if located.column not in schema.names:
            raise no_column(str(path), located.column, schema.names)
        _check(located, str(path), schema.field(located.column).type)
    if not records:
        raise no_documents(located.name)
    try:
        return load_dataset(
            "parquet",
            data_files=[glob.escape(str(path.resolve())) for path in located.paths],
            split="train",
            columns=[located.column],
            cache_dir=str(folder),
            num_proc=_processes(located.paths, workers),
        )
    except Exception as error:
        if disk_full(error):
            raise
        for path in located.paths:
            with readable(path), pq.ParquetFile(path) as file:
                for _ in file.iter_batches(64, columns=[located.column]):
                    pass
        raise


def _read_arrow(located: Located) -> Dataset:
    parts = [opened(located, path) for path in located.paths]
    if any(located.column not in part.column_names for part in parts):
        return parts[0]
    return concatenate_datasets([part.select_columns([located.column]) for part in parts])


def opened(located: Located, path: Path) -> Dataset:
    with readable(path):
        return load_from_disk(str(path)) if located.kind == "saved" else Dataset.from_file(str(path))


def _read_documents(located: Located, folder: Path, workers: int) -> Dataset:
    """JSON and text. Read record by record: the library's JSON reader wants all metadata of all records alike."""
    arguments: dict[str, Any] = {"files": list(map(str, located.paths)), "kind": located.kind, "column": located.column}
    arguments["chat"] = located.content == "chat"
    try:
        return Dataset.from_generator(
            documents,
            features=Features({TEXT_COLUMN: Value("large_string")}),
            gen_kwargs=arguments,
            cache_dir=str(folder),
            num_proc=_processes(located.paths, workers),
            writer_batch_size=256,  # documents may be large
        )
    except Exception as error:
        if disk_full(error):
            raise
        if not sum(1 for _ in documents(**arguments)):  # meets again, here, a cause that stayed in a worker process
            raise no_documents(located.name) from error
        raise


def _processes(paths: Sequence[Path], workers: int) -> int | None:
    count = min(workers, len(paths), sum(path.stat().st_size for path in paths) // _PROCESS_BYTES)
    return count if count > 1 else None


def _check(located: Located, where: str, kind: pa.DataType) -> None:
    """Raises UsageError where a file's column holds something else than the first one's."""
    if _content(where, located.column, kind) != located.content:
        raise no_text(where, located.column, str(kind), _CALLED[located.content])


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a used-up quota, is behind an error, also one that crossed from another process."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in ("No space left on device", "Not enough disk space")):
            return True
        error = error.__cause__ or error.__context__
    return False
