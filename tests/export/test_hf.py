"""Transformers folders: dtype, shards, card, uploads through the client's own surface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm.cli import main
from efficientllm.errors import UsageError
from efficientllm.export.hf import export_hf
from efficientllm.export.push import check_push, push_folder
from efficientllm.export.subject import subject_of


def quiet(message: str) -> None:
    pass


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


@pytest.mark.parametrize(("dtype", "shard"), [("float32", "5GB"), ("bfloat16", "20KB"), ("float16", "20KB")])
def test_weights_are_those_of_the_run_rounded(finished_run: Path, tmp_path: Path, dtype: str, shard: str) -> None:
    out = export_hf(subject_of(finished_run), dtype, shard, tmp_path / "out", say=quiet)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB") == (out / "model.safetensors.index.json").is_file()
    if len(files) > 1:
        assert max(file.stat().st_size for file in files) < 45_000  # one weight may be larger than a shard
    written = {name: weight for file in files for name, weight in load_file(file).items()}
    source = load_file(finished_run / "model" / "model.safetensors")
    assert written.keys() == source.keys()
    for name, weight in source.items():
        assert torch.equal(written[name], weight.to(getattr(torch, dtype)))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    text = "the model learns to write"
    assert AutoTokenizer.from_pretrained(out).decode(AutoTokenizer.from_pretrained(out)(text).input_ids) == text


def test_the_card_carries_the_hub_s_block_and_what_was_measured(finished_run: Path, tmp_path: Path) -> None:
    (finished_run / "eval").mkdir(exist_ok=True)
    measured = {"results": {"boolq": {"acc,none": 0.625, "acc_stderr,none": 0.1}}}
    (finished_run / "eval" / "results.json").write_text(json.dumps(measured))
    out = export_hf(subject_of(finished_run), out=tmp_path / "carded", licence="apache-2.0", say=quiet)
    text = (out / "README.md").read_text()
    block = yaml.safe_load(text.split("---\n")[1])
    assert block["library_name"] == "transformers"
    assert block["license"] == "apache-2.0"
    assert "pruned" in block["tags"]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert f"{summary['result']['validation_loss']:.3f}" in text
    assert "boolq" in text
    assert "| boolq | acc | 0.6250 | 0.1000 |" in text


def test_a_ladder_size_and_options_of_the_command(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (milestone,) = (finished_run / "ladder").iterdir()
    out = tmp_path / "rung"
    assert call("export", milestone, "--to", "hf", "--out", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert call("export", milestone, "--to", "hf", "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert call("export", milestone, "--to", "hf", "--type", "f16") == 2
    assert "--type has no effect with --to hf" in capsys.readouterr().err
    assert call("export", milestone, "--to", "hf", "--max-shard-size", "huge", "--out", tmp_path / "huge") == 2
    assert "is no size" in capsys.readouterr().err
    assert not (tmp_path / "huge").exists()


@pytest.fixture
def hub() -> Any:
    """The client's own surface, with its signatures; nothing leaves this process."""
    api = create_autospec(HfApi, instance=True)
    api.token = "hf_secret"
    api.repo_exists.return_value = False
    api.create_repo.return_value = "https://example.org/me/compact"
    return api


def test_a_push_makes_the_repository_and_uploads_the_whole_folder(hub: Any, tmp_path: Path) -> None:
    check_push("me/compact", hub)
    assert push_folder(tmp_path, "me/compact", private=True, api=hub) == "https://example.org/me/compact"
    hub.create_repo.assert_called_once_with("me/compact", private=True, exist_ok=True)
    assert hub.upload_folder.call_args.kwargs["folder_path"] == tmp_path
    assert hub.upload_folder.call_args.kwargs["repo_id"] == "me/compact"


def test_a_push_that_fails_says_why_and_never_the_token(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.upload_folder.side_effect = OSError("403 Forbidden for token hf_secret")
    with pytest.raises(UsageError, match="cannot push to me/compact: 403 Forbidden") as error:
        push_folder(tmp_path, "me/compact", private=False, api=hub)
    assert "hf_secret" not in str(error.value)
    for name in ("compact", "a/b/c", "me/com pact"):
        with pytest.raises(UsageError, match="--push"):
            check_push(name, hub)
    monkeypatch.setattr("efficientllm.export.push.get_token", lambda: None)
    with pytest.raises(UsageError, match="hf auth login"):
        check_push("me/compact")
