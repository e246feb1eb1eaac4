"""A config.json that no model has, or that transformers' own checks stumble over, is one sentence everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_model
from efficientllm.cli import main
from efficientllm.errors import UsageError
from efficientllm.export.weights import Weights
from efficientllm.models.loading import load_config, load_model, load_tokenizer

BROKEN: list[tuple[Any, str]] = [
    ({"hidden_size": 130, "num_attention_heads": 8, "head_dim": None}, "not a multiple of the number of attention"),
    ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
    ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
    ({"hidden_act": None}, "'hidden_act' expected str, got NoneType"),
    ({"num_attention_heads": 0}, "ZeroDivisionError|num_attention_heads 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads 0, which is no positive number"),
    ({"num_hidden_layers": -1}, "num_hidden_layers -1, which is no positive number"),
    ({"num_key_value_heads": 3}, "4 heads, no multiple of its 3 key/value heads"),
    (None, "TypeError"),
    ([], "model_type"),
]


@pytest.fixture
def broken(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    change = request.param
    file.write_text(json.dumps(json.loads(file.read_text()) | change if isinstance(change, dict) else change))
    return file.parent


@pytest.mark.parametrize(("broken", "reason"), BROKEN, indirect=["broken"], ids=lambda value: str(value)[:40])
def test_a_broken_configuration_is_one_sentence(broken: Path, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    for read in (lambda: load_config(str(broken)), lambda: load_model(str(broken)), lambda: Weights(broken)):
        with pytest.raises(UsageError, match=reason) as raised:
            read()
        assert "\n" not in str(raised.value)
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(broken), "--device", "cpu"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_wrong_path_of_two_parts_is_not_blamed_on_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the form of a hub id, of which the hub says what it says."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect")

    monkeypatch.setattr("efficientllm.models.loading.AutoConfig.from_pretrained", fail)
    with pytest.raises(
        UsageError, match=r"'models/nowhere': We couldn't connect; there is no folder of that name here"
    ):
        load_config("models/nowhere")


def test_what_cannot_be_read_is_called_what_the_user_called_it(tmp_path: Path) -> None:
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(UsageError, match=r"teacher '\./not/there' is neither a folder nor a hub id"):
            load("./not/there", what="teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot read the configuration of teacher"):
        load_config(str(tmp_path / "empty"), what="teacher")
    with pytest.raises(UsageError, match="its files lie beside the model's"):
        load_tokenizer(str(tmp_path / "empty"), what="model")
    with pytest.raises(UsageError, match="name one with `tokenizer:` in the recipe"):
        load_tokenizer(str(tmp_path / "empty"))
