"""What a GGUF file says of its model, and the card beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")

from export.gguf_files import field, write


def test_every_file_of_a_folder_has_a_card_of_its_own(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa")
    for kind in ("f16", "f32"):
        write(folder, kind, out=tmp_path / "x" / f"m-1.5-{kind}.gguf")
    for kind in ("f16", "f32"):
        assert f"llama-cli -m m-1.5-{kind}.gguf" in (tmp_path / "x" / f"m-1.5-{kind}.md").read_text()


def test_metadata_says_what_it_was_made_from(finished_run: Path, tmp_path: Path) -> None:
    reader, _ = write(finished_run, "f16", out=tmp_path / "x" / "m.gguf", licence="apache-2.0")
    assert field(reader, "general.name").startswith("source, pruned to ")
    assert field(reader, "general.license") == "apache-2.0"
    assert field(reader, "general.base_model.0.name") == "source"
    assert field(reader, "general.tags") == ["efficientllm", "pruned"]
    assert "pruned while it kept training, from source" in field(reader, "general.description")
    card = (tmp_path / "x" / "m.md").read_text()
    assert "library_name: gguf" in card
    assert "license: apache-2.0" in card
    assert str(tmp_path) not in card
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["m.gguf", "m.md"]


def test_a_text_of_somebody_else_stays(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "m.md").write_text("# My project\n")
    _, said = write(folder, out=tmp_path / "x" / "m.gguf")
    assert (tmp_path / "x" / "m.md").read_text() == "# My project\n"
    assert any("left as it is" in note for note in said)
