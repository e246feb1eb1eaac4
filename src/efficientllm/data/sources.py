"""Where text comes from: what a path means, and reading it into one column of strings.

A path is, by the first rule that fits:
    a folder that exists     one written by `Dataset.save_to_disk`, or else all the data files in it
    a file that exists       by its ending, see _KINDS
    with *, ? or [ in it     the files that match, ** included
    org/name                 a hub id, unless it ends like a data file
Several files are read in the order of their paths, and must be of one kind. A record of a parquet, JSON or Arrow file
is a document, and so is a whole text file.
"""

from __future__ import annotations

import errno
import glob
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset, load_from_disk

from efficientllm.data.documents import PACKED, TEXT_COLUMN, documents, no_column, no_documents, no_text, readable
from efficientllm.errors import UsageError

if TYPE_CHECKING:
    from efficientllm.config import DataSource

Kind = Literal["parquet", "json", "text", "arrow", "saved", "hub"]
_KINDS: dict[str, Kind] = {".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
_KINDS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "json")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_PROCESS_BYTES = 32 << 20


@dataclass(frozen=True)
class Located:
    """A source whose kind is known. paths: its files; for `saved` the one folder; for `hub` none."""

    kind: Kind
    source: DataSource
    paths: tuple[Path, ...]
    column: str

    @property
    def name(self) -> str:
        return ":".join(filter(None, (self.source.place, self.source.name, self.source.split)))

    def files(self) -> list[Path]:
        """Every file that holds content, in a fixed order."""
        if self.kind == "saved":
            return sorted(path for path in self.paths[0].rglob("*") if path.is_file())
        return list(self.paths)


def locate(source: DataSource) -> Located:
    """Decides what a path means. Raises UsageError, naming the path, where nothing is to be found."""
    path = Path(source.place).expanduser()
    if path.is_dir():
        located = _locate_folder(path, source)
    elif path.is_file():
        located = _locate_files([path], source)
    elif glob.has_magic(source.place):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (absolute too)
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UsageError(
                f"no file matches the data path '{source.place}' (looked from {Path.cwd()}); mend the path"
            )
        located = _locate_files(files, source)
    elif _HUB_ID.fullmatch(source.place) and _kind_of(path) is None:
        return Located("hub", source, (), source.text_column)
    else:
        raise UsageError(
            f"the data path '{source.place}' does not exist (looked from {Path.cwd()}) and is no hub id such as "
            "org/name; mend the path"
        )
    if source.name or (source.split and located.kind != "saved"):
        raise UsageError(
            f"'{source.place}' is read from this machine, where name and split have no meaning; remove "
            f"'{source.path.removeprefix(source.place)}'"
        )
    return located


def _kind_of(path: Path) -> Kind | None:
    packed = path.suffix in PACKED
    kind = _KINDS.get(Path(path.stem).suffix if packed else path.suffix)
    return None if packed and kind not in ("json", "text") else kind


def _locate_folder(folder: Path, source: DataSource) -> Located:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        split = source.split or "train"
        if split not in splits:
            raise UsageError(f"'{source.place}' has no split '{split}'; choose one of: {', '.join(splits)}")
        return Located("saved", source, (folder / split,), source.text_column)
    if (folder / "state.json").is_file():
        if source.split:
            raise UsageError(f"'{source.place}' is saved without splits; remove ':{source.split}'")
        return Located("saved", source, (folder,), source.text_column)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind_of(path)]
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        raise UsageError(f"the folder '{source.place}' holds no data file ({', '.join(_KINDS)}); mend the path")
    return _locate_files(visible, source)


def _locate_files(files: Sequence[Path], source: DataSource) -> Located:
    kinds: dict[Kind, Path] = {}
    for file in files:
        kind = _kind_of(file)
        if kind is None:
            endings = ", ".join([*_KINDS, ".jsonl.gz", ".jsonl.zst"])
            raise UsageError(f"'{file}' does not end like a data file ({endings}); rename it, or narrow the path")
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        raise UsageError(
            f"'{source.place}' mixes kinds of files, such as {' and '.join(str(file) for file in kinds.values())}; "
            "name each kind as a source of its own"
        )
    (kind,) = kinds
    return Located(kind, source, tuple(files), TEXT_COLUMN if kind == "text" else source.text_column)


def read(located: Located, folder: Path, workers: int) -> Dataset:
    """The texts of a source as a memory-mapped data set of one column. What has to be unpacked goes under `folder`.

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
    _check_text(located.name, located.column, texts.data.schema.field(located.column).type)
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
            raise
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
        _check_text(str(path), located.column, schema.field(located.column).type)
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
    parts = []
    for path in located.paths:
        with readable(path):
            parts.append(load_from_disk(str(path)) if located.kind == "saved" else Dataset.from_file(str(path)))
    if any(located.column not in part.column_names for part in parts):
        return parts[0]
    return concatenate_datasets([part.select_columns([located.column]) for part in parts])


def _read_documents(located: Located, folder: Path, workers: int) -> Dataset:
    """JSON and text. Read record by record: the library's JSON reader wants all metadata of all records alike."""
    arguments: dict[str, Any] = {"files": list(map(str, located.paths)), "kind": located.kind, "column": located.column}
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


def _check_text(where: str, column: str, kind: pa.DataType) -> None:
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise no_text(where, column, str(kind))


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a used-up quota, is behind an error, also one that crossed from another process."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in ("No space left on device", "Not enough disk space")):
            return True
        error = error.__cause__ or error.__context__
    return False
