"""What is taken for a run, a size of a ladder or a mere folder; what an export must not delete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from efficientllm.checkpoint.export import refuse_foreign
from efficientllm.errors import UsageError
from efficientllm.export.hf import export_hf
from efficientllm.export.subject import subject_of
from efficientllm.export.weights import Weights


def test_a_recipe_beside_a_model_makes_no_ladder(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa")
    home = tmp_path / "project"
    shutil.copytree(folder, home / "model")
    (home / "recipe.yaml").write_text("cake: yes\n")
    assert subject_of(home / "model").folder == home / "model"
    assert subject_of(home / "model").name == "model"
    with pytest.raises(UsageError, match="holds neither a run nor a model"):
        subject_of(home)


def test_a_size_of_a_ladder_is_found_by_its_folder_and_its_model(finished_run: Path) -> None:
    (milestone,) = (finished_run / "ladder").iterdir()
    for path in (milestone, milestone / "model"):
        subject = subject_of(path)
        assert subject.name == f"exported-{milestone.name}"
        assert subject.home == finished_run
        assert subject.facts is not None


@pytest.mark.parametrize("content", [{}, {"accuracy": 0.5}, {"source": "x", "result": 1, "tokens": 2}, []])
def test_a_summary_of_something_else_says_nothing_of_the_model(make_model: Any, tmp_path: Path, content: Any) -> None:
    folder, _ = make_model("llama-gqa")
    shutil.copytree(folder, tmp_path / "mine" / "model")
    (tmp_path / "mine" / "summary.json").write_text(json.dumps(content))
    subject = subject_of(tmp_path / "mine")
    assert subject.facts is None
    assert "nothing else is known" in subject.card(Weights(subject.folder).config, 1000).text()


def test_a_card_in_another_encoding_is_carried_over(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa")
    (folder / "README.md").write_bytes("# Modèle\n".encode("latin-1"))
    out = export_hf(subject_of(folder), out=tmp_path / "out", say=lambda note: None)
    assert (out / "README.md").read_text() == "# Mod\ufffdle\n"


@pytest.mark.parametrize("names", [["notes.md"], ["a.txt", "b.json"], ["config.json", "notes.md"], ["w.safetensors"]])
def test_a_folder_of_notes_is_not_overwritten(make_model: Any, tmp_path: Path, names: list[str]) -> None:
    folder, _ = make_model("llama-gqa")
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in names:
        (notes / name).write_text("mine")
    with pytest.raises(UsageError, match="is no model folder"):
        export_hf(subject_of(folder), out=notes, overwrite=True, say=lambda note: None)
    assert sorted(path.name for path in notes.iterdir()) == sorted(names)


def test_a_model_folder_and_an_empty_one_are(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa")
    (tmp_path / "empty").mkdir()
    for shards in ("5GB", "20KB", "5GB"):
        out = tmp_path / "empty"
        export_hf(subject_of(folder), "float32", shards, out, overwrite=True, say=lambda note: None)
    refuse_foreign(tmp_path / "nowhere")
