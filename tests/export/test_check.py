"""`export --check`: what it says of each runtime, what it lets pass; compact models in vLLM itself.

vLLM's tests skip themselves where there is none: neither here, nor in the interpreter (docs/export.md) that is
named in EFFICIENTLLM_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import need_llamacpp, tiny_model
from efficientllm import Pruner
from efficientllm.cli import main
from efficientllm.errors import UsageError
from efficientllm.export import check
from efficientllm.export.check import ANOTHER_RUNTIME, VLLM_PYTHON, ask, check_gguf, check_hf, judge, request_for
from efficientllm.export.hf import export_hf
from efficientllm.export.subject import subject_of

VLLM = os.environ.get(VLLM_PYTHON) or (sys.executable if find_spec("vllm") else "")
needs_vllm = pytest.mark.skipif(not VLLM, reason=f"vLLM is not installed; {VLLM_PYTHON} may name a Python that has it")
HEADS = {"head_dim": 32, "vocab_size": 300}  # a size of heads that vLLM has kernels for on a CPU


def quiet(message: str) -> None:
    pass


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter whose vLLM refuses whatever it is given."""
    file = tmp_path / "python"
    file.write_text('#!/bin/sh\ncat >/dev/null\necho \'{"error": "ValueError: no heads of 6"}\'\n')
    file.chmod(0o755)
    monkeypatch.setenv(VLLM_PYTHON, str(file))


def test_a_check_in_a_fresh_process_sees_a_wrong_weight(finished_run: Path, tmp_path: Path, stub: None) -> None:
    """What an unharmed folder is told, the example of an export to GGUF goes through."""
    source = shutil.copytree(finished_run / "model", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    out = export_hf(subject_of(source), out=tmp_path / "checked", say=quiet)
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    with pytest.raises(UsageError, match=r"is not the model it was made from: .* of 36 positions"):
        check_hf(source, out, "float32", said.append)
    assert [line.split(":")[0].split()[0] for line in said] == ["transformers", "vLLM"]
    assert said[1] == "vLLM: refused: ValueError: no heads of 6"


ANSWER = {"logprobs": [[-1.0, -20.0]], "top": [[3, 4]], "greedy": [[5, 6, 7]]}


def answered(monkeypatch: pytest.MonkeyPatch, **vllm: Any) -> None:
    """transformers answers ANSWER, any other runtime the same but for what is given."""

    def answer(runtime: str, python: str, models: list[Path], request: dict[str, Any]) -> dict[str, Any]:
        answers = [ANSWER if runtime == "transformers" else ANSWER | vllm for _ in models]
        return {"version": "1.2", "answers": answers}

    monkeypatch.setattr(check, "request_for", lambda folder: {})
    monkeypatch.setattr(check, "ask", answer)
    monkeypatch.setattr(check, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"logprobs": [[-1.0, -20.0 + 1e-3]]}, None),
        ({"logprobs": [[-1.0 + 1e-2, -20.0]]}, "differ by at most 1.00e-02"),
        ({"greedy": [[5, 6, 8]]}, "2 of 3 greedy tokens the same"),
    ],
)
def test_what_another_runtime_may_compute(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], complaint: str | None
) -> None:
    answered(monkeypatch, **changes)
    said: list[str] = []
    if complaint is None:
        check_hf(Path("a"), Path("b"), "float32", said.append)
    else:
        with pytest.raises(UsageError, match=f"b is not the model it was made from: in vLLM 1.2, .*{complaint}"):
            check_hf(Path("a"), Path("b"), "float32", said.append)
    assert [line.split(":")[0] for line in said] == ["transformers 1.2", "vLLM 1.2"]
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    check_hf(Path("a"), Path("b"), "float32", said.append)
    assert said[-1].startswith("vLLM: not tried")
    with pytest.raises(UsageError, match=r"needs llama\.cpp"):
        check_gguf(Path("a"), Path("b.gguf"), "f16", quiet)


@pytest.mark.parametrize(
    ("kind", "share", "fits"), [("f16", 5e-3, True), ("f16", 5e-2, False), ("q4_0", 0.2, True), ("q4_0", 0.6, False)]
)
def test_what_a_type_of_gguf_may_change(monkeypatch: pytest.MonkeyPatch, kind: str, share: float, fits: bool) -> None:
    answered(monkeypatch, logprobs=[[-1.0, -20.0 * (1 - share)]], greedy=[[1, 1, 1]])
    if fits:
        check_gguf(Path("a"), Path("b.gguf"), kind, quiet)
    else:
        with pytest.raises(UsageError, match=f"the type {kind} explains less"):
            check_gguf(Path("a"), Path("b.gguf"), kind, quiet)


def test_an_interpreter_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not start"):
        ask("vllm", str(tmp_path / "no-python"), [], {})
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\necho it crashed >&2\nkill -9 $$\n")
    file.chmod(0o755)
    assert ask("vllm", str(file), [], {}) == {"error": "its process ended with code -9: it crashed"}


def test_a_gguf_file_is_checked_in_llamacpp(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_llamacpp()
    file = tmp_path / "m.gguf"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(finished_run), "--to", "gguf", "--type", "f32", "--out", str(file), "--check"])
    said = capsys.readouterr().err
    assert stop.value.code == 0, said
    assert "llama.cpp 0." in said
    (milestone,) = (finished_run / "ladder").iterdir()
    with pytest.raises(UsageError, match=r"m\.gguf is not the model it was made from: in llama\.cpp"):
        check_gguf(milestone / "model", file, "f32", quiet)


def test_a_qwen2_that_vllm_would_misread_is_said(make_model: Any, tmp_path: Path) -> None:
    for name, hidden, expected in (("odd", 40, 1), ("square", 24, 0)):
        folder, _ = make_model("qwen2-gqa-tied", hidden_size=hidden)
        said: list[str] = []
        export_hf(subject_of(folder), out=tmp_path / name, say=said.append)
        assert sum("would serve another model" in note for note in said) == expected
        shutil.rmtree(folder)


def pruned(folder: Path) -> Path:
    """A Llama of 9 query and 3 KV heads, cut to odd widths: saved as a Mistral."""
    model = tiny_model("llama-gqa", hidden_size=72, num_attention_heads=9, num_key_value_heads=3, **HEADS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    widths = {"hidden": 61, "intermediate": 43}
    pruner = Pruner(model, optimizer, target=widths, steps=2, align=1, floors={"intermediate": 8}, bound=0.5)
    for seed in range(3):
        ids = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
    assert pruner.finished
    pruner.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["intermediate_size"]) == ("mistral", 61, 43)
    return folder


@needs_vllm
@pytest.mark.slow
def test_compact_models_in_vllm(tmp_path: Path) -> None:
    """Llama, Mistral, odd widths, 9/3 and 5/1 heads, Qwen3: tokens as in transformers, and log-probabilities nearly."""
    shapes: dict[str, dict[str, Any]] = {
        "llama-gqa": {"hidden_size": 64, "intermediate_size": 96},
        "mistral-gqa-tied": {
            "hidden_size": 37,
            "intermediate_size": 51,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
        },
        "qwen2-gqa-tied": {"hidden_size": 128, "intermediate_size": 75},
        "qwen3-gqa": {"hidden_size": 45, "intermediate_size": 77, "num_attention_heads": 3, "num_key_value_heads": 1},
    }
    folders = [pruned(tmp_path / "pruned")]
    for family, shape in shapes.items():
        folders.append(tmp_path / family)
        tiny_model(family, **HEADS, **shape).save_pretrained(folders[-1])
    request = request_for(folders[0])
    want, got = (
        ask(name, python, folders, request) for name, python in (("transformers", sys.executable), ("vllm", VLLM))
    )
    assert "error" not in got, got
    for folder, before, after in zip(folders, want["answers"], got["answers"], strict=True):
        assert torch.tensor(before["logprobs"]).min() < -5.0, folder
        assert judge(folder.name, before, after, ANOTHER_RUNTIME, True, quiet) is None


@needs_vllm
@pytest.mark.slow
def test_vllm_refuses_a_head_size_in_its_own_words(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny world's heads of 6, for which it has no kernel on any device."""
    with pytest.raises(SystemExit) as stop:
        main(["export", str(finished_run), "--to", "hf", "--out", str(tmp_path / "out"), "--check"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "vLLM: refused:" in said
    assert "head_dim=6" in said or "ead size 6" in said
