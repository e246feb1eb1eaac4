"""A disk that is full, two exports at once, files that are there already."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")

from efficientllm.errors import UsageError  # noqa: E402
from export.gguf_files import write  # noqa: E402


@contextmanager
def small_disk(most: int) -> Iterator[None]:
    """No file of this process may grow beyond `most` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_model("llama-gqa")
    write(folder, out=tmp_path / "x" / "m.gguf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    with small_disk(60_000), pytest.raises(UsageError, match="free disk space or choose another place with --out"):
        write(folder, out=tmp_path / "x" / "m.gguf", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    with pytest.raises(UsageError, match=r"exists already; .*--overwrite"):
        write(folder, out=tmp_path / "x" / "m.gguf")
    with pytest.raises(UsageError, match="is a folder; name a file"):
        write(folder, out=tmp_path / "x")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UsageError, match=r"0.00 GB are free"):
        write(folder, out=tmp_path / "y" / "m.gguf")


@pytest.mark.parametrize("missing", [1, 6, 32, 100, 5000])
def test_a_disk_too_small_by_a_few_bytes_leaves_no_file(make_model: Any, tmp_path: Path, missing: int) -> None:
    """The last bytes, padding among them, are in a buffer until the file is closed."""
    folder, _ = make_model("mistral-gqa-tied", hidden_size=37)
    write(folder, "f16", out=tmp_path / "whole.gguf")
    size = (tmp_path / "whole.gguf").stat().st_size
    (tmp_path / "x").mkdir()
    with small_disk(size - missing), pytest.raises(UsageError, match="free disk space or choose another place"):
        write(folder, "f16", out=tmp_path / "x" / "m.gguf")
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("size", [10, 100, 1000, 5000])
def test_a_disk_with_no_room_at_all_leaves_no_file(make_model: Any, tmp_path: Path, size: int) -> None:
    folder, _ = make_model("llama-gqa")
    (tmp_path / "x").mkdir()
    with small_disk(size), pytest.raises(UsageError, match="free disk space or choose another place"):
        write(folder, out=tmp_path / "x" / "m.gguf")
    assert list((tmp_path / "x").iterdir()) == []


def test_a_folder_that_may_not_be_written_is_one_sentence(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match=r"cannot write .*m\.gguf"):
        write(folder, out=tmp_path / "file" / "m.gguf")


def test_two_exports_at_once_do_not_mix(make_model: Any, tmp_path: Path) -> None:
    """Another process's file under way stays; that of a process which is gone is cleared."""
    folder, _ = make_model("llama-gqa")
    host = socket.gethostname()
    running = tmp_path / "x" / f".partial-m.gguf.{host}.{os.getppid()}"
    gone = tmp_path / "x" / f".partial-m.gguf.{host}.{2**31 - 1}"
    running.parent.mkdir()
    running.write_bytes(b"half")
    gone.write_bytes(b"half")
    write(folder, out=tmp_path / "x" / "m.gguf")
    assert sorted(path.name for path in running.parent.iterdir()) == [running.name, "m.gguf", "m.md"]
