"""Generation settings: those that transformers reads and does not save, and files that are no settings at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from conftest import tiny_model
from efficientllm.checkpoint.export import export_model
from efficientllm.models.generation import savable
from efficientllm.models.loading import load_generation_config


def loaded(folder: Path, content: Any) -> tuple[GenerationConfig | None, list[str]]:
    """What is read of a folder with this generation_config.json, and what is said of it."""
    said: list[str] = []
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return load_generation_config(str(folder), said.append), said


@pytest.mark.parametrize(
    ("content", "kept", "left_out"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "do_sample": True}, []),
        ({"temperature": 0.6, "do_sample": False, "eos_token_id": [2, 5]}, {"eos_token_id": [2, 5]}, ["temperature"]),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}, {}, ["temperature", "top_p", "top_k", "min_p"]),
        ({"length_penalty": 2.0, "eos_token_id": 3}, {"eos_token_id": 3}, ["length_penalty"]),
        ({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 4, "length_penalty": 2.0}, []),
        ({"pad_token_id": -1, "bos_token_id": 1}, {"bos_token_id": 1}, ["pad_token_id"]),
        ({"eos_token_id": "</s>", "bos_token_id": 1}, {"bos_token_id": 1}, ["eos_token_id"]),
        ({"num_return_sequences": 4, "eos_token_id": 3, "max_length": 9}, {"eos_token_id": 3}, ["but for token ids"]),
    ],
)
def test_settings_are_made_fit_to_save(
    tmp_path: Path, content: dict[str, Any], kept: dict[str, Any], left_out: list[str]
) -> None:
    settings, said = loaded(tmp_path, content)
    assert settings is not None
    settings.use_cache = True  # as every export does: what is changed is judged more strictly than what was loaded
    settings.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again | kept == again
    assert len(said) == bool(left_out)
    assert all(word in said[0] and word not in again for word in left_out)


def test_settings_from_which_nothing_is_dropped_are_the_same_object() -> None:
    settings = GenerationConfig(do_sample=True, temperature=0.5)
    assert savable(settings) == (settings, None)


@pytest.mark.parametrize("content", ["[]", "null", "{", "3", '"x"'])
def test_a_damaged_file_is_told_and_its_absence_is_not(tmp_path: Path, content: str) -> None:
    settings, said = loaded(tmp_path, content)
    assert settings is None
    assert len(said) == 1
    assert "generation_config.json is damaged" in said[0]
    assert "\n" not in said[0]
    with pytest.warns(UserWarning, match="is damaged"):
        load_generation_config(str(tmp_path))
    (tmp_path / "generation_config.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_generation_config(str(tmp_path)) is None


def test_a_run_s_model_is_exported_with_any_settings(tmp_path: Path) -> None:
    """At the end of a run nothing may fail that could have been known at its start."""
    model = tiny_model("llama-gqa")
    export_model(model, None, tmp_path / "a", generation=GenerationConfig(temperature=0.6, eos_token_id=7))
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"] == 7
    model.config.pad_token_id = -1
    export_model(model, None, tmp_path / "b")
    assert "pad_token_id" not in json.loads((tmp_path / "b" / "generation_config.json").read_text())
