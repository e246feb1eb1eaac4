"""Folders appear whole, or what stood there before stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import tiny_model
from efficientllm.checkpoint.export import export_model
from efficientllm.errors import UsageError
from efficientllm.files import atomic_path


def write(folder: Path, text: str) -> None:
    with atomic_path(folder) as partial:
        (partial / "content").write_text(text)


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "thing"
    write(folder, "old")
    with pytest.raises(IsADirectoryError), atomic_path(folder) as partial:
        partial.write_text("half")
    assert (folder / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    write(folder, "new")
    assert (folder / "content").read_text() == "new"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The state after such a kill: the old folder waits under another name; the next write, even a failing one,
    takes it back."""
    folder = tmp_path / "thing"
    write(folder, "old")
    folder.rename(tmp_path / ".replaced-thing")
    with pytest.raises(RuntimeError), atomic_path(folder):
        raise RuntimeError
    assert (folder / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_full_disk_while_exporting_leaves_the_former_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    model = tiny_model("llama-gqa")
    export_model(model, None, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(path: Path, **_: object) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", refuse)
    with pytest.raises(UsageError, match="free disk space"):
        export_model(model, None, folder)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="template"):  # nothing that a disk has refused
        export_model(model, None, folder, extras=lambda path: (path / "template").read_text())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
