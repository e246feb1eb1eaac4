"""Where text comes from: what a path means, decided by what is there.

A path is, by the first rule that fits:
    a folder that exists     one written by `Dataset.save_to_disk`, or else all the data files in it
    a file that exists       by its ending, see _KINDS; of Megatron's .bin and .idx either, or what both begin with
    with *, ? or [ in it     the files that match, ** included
    org/name                 a hub id, unless it ends like a data file
Several files are read in the order of their paths, and must be of one kind. A record of a parquet, JSON or Arrow file
is a document, and so is a whole text file; Megatron's index says where its documents end.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from efficientllm.data.documents import PACKED, TEXT_COLUMN, TOKEN_COLUMN
from efficientllm.errors import UsageError

if TYPE_CHECKING:
    from efficientllm.config import DataSource

Kind = Literal["parquet", "json", "text", "arrow", "saved", "hub", "megatron"]
Content = Literal["text", "chat", "tokens"]  # of a record: a text, a conversation, token ids
_KINDS: dict[str, Kind] = {".parquet": "parquet", ".txt": "text", ".arrow": "arrow", ".idx": "megatron"}
_KINDS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "json")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Located:
    """A source whose kind is known. paths: its files, of Megatron's the indices; for `saved` the one folder; for `hub`
    none. column, content: what is read of a record; by default as asked (sources.resolved looks)."""

    kind: Kind
    source: DataSource
    paths: tuple[Path, ...]
    column: str
    content: Content = "text"

    @property
    def name(self) -> str:
        return ":".join(filter(None, (self.source.place, self.source.name, self.source.split)))

    def files(self) -> list[Path]:
        """Every file that holds content, in a fixed order."""
        if self.kind == "saved":
            return sorted(path for path in self.paths[0].rglob("*") if path.is_file())
        if self.kind == "megatron":
            return [file for path in self.paths for file in (path, path.with_suffix(".bin"))]
        return list(self.paths)


def locate(source: DataSource) -> Located:
    """Decides what a path means. Raises UsageError, naming the path, where nothing is to be found."""
    path = Path(source.place).expanduser()
    index = _index_of(path)
    if index is not None:
        located = _locate_files([index], source)
    elif path.is_dir():
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


def _index_of(path: Path) -> Path | None:
    """Megatron's index where a path is of its tokens, or what the names of both begin with."""
    index = path.with_suffix(".idx") if path.suffix == ".bin" else Path(f"{path}.idx")
    return index if index.is_file() and (path.suffix == ".bin" or not path.exists()) else None


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
        raise UsageError(
            f"the folder '{source.place}' holds no data file ({', '.join(_KINDS)}); mend the path, or convert it"
        )
    return _locate_files(visible, source)


def _locate_files(files: Sequence[Path], source: DataSource) -> Located:
    kinds: dict[Kind, Path] = {}
    for file in files:
        kind = _kind_of(file)
        if kind is None:
            endings = ", ".join([*_KINDS, ".jsonl.gz", ".jsonl.zst"])
            raise UsageError(
                f"'{file}' does not end like a data file ({endings}); convert or rename it, or narrow the path"
            )
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        raise UsageError(
            f"'{source.place}' mixes kinds of files, such as {' and '.join(str(file) for file in kinds.values())}; "
            "name each kind as a source of its own"
        )
    (kind,) = kinds
    if kind == "megatron":
        for file in files:
            if not file.with_suffix(".bin").is_file():
                raise UsageError(f"'{file}' has no '{file.stem}.bin' beside it, with the tokens; copy both")
        return Located(kind, source, tuple(files), TOKEN_COLUMN, "tokens")
    return Located(kind, source, tuple(files), TEXT_COLUMN if kind == "text" else source.text_column)
