"""What cannot become a GGUF file gets one sentence, and leaves none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

gguf = pytest.importorskip("gguf")

from conftest import tiny_config  # noqa: E402
from efficientllm.errors import UsageError  # noqa: E402
from efficientllm.export.gguf_architectures import architecture_of  # noqa: E402
from efficientllm.export.gguf_tensors import rope_factors  # noqa: E402
from export.gguf_files import LLAMA3, write  # noqa: E402

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6}


def test_other_scaling_is_refused(make_model: Any) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    folder, _ = make_model("llama-gqa", rope_parameters=yarn)
    with pytest.raises(UsageError, match=r"'yarn'.*--to hf"):
        write(folder)
    folder, model = make_model("qwen2-gqa-tied", head_dim=10, rope_parameters=LLAMA3)
    with pytest.raises(UsageError, match="llama3"):
        rope_factors(model.config, "qwen2")


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("smollm3-gqa-tied", {}, r"in llama.cpp's smollm3 layers \[\] \(from 0\) have no rotary positions, .* \[1\]"),
        ("gemma3-gqa", {}, r"in llama.cpp's gemma3 layers \[\] \(from 0\) have no window, in this model layers \[1\]"),
        ("gemma2-gqa-tied", {"tie_word_embeddings": False}, "gemma2 has no room for an LM head of its own"),
        ("gemma2-gqa-tied", {"attn_logit_softcapping": None}, "needs a number for attn_logit_softcapping"),
        ("olmo2-gqa", {"tie_word_embeddings": True, "head_dim": 10}, "olmo2 lacks an LM head of its own"),
        ("olmo2-gqa", {}, r"olmo2 takes heads x head_dim \(24\) only as the hidden size \(40\)"),
        ("phi-gqa", {"rope_parameters": PARTIAL}, "rotates whole heads in these models, this one has a partial"),
        ("qwen2-gqa-tied", {"hidden_act": "relu"}, "computes these models with SiLU, this one has hidden_act=relu"),
        ("granite-gqa", {"hidden_act": "relu"}, "computes these models with SiLU, this one has hidden_act=relu"),
    ],
)
def test_what_an_architecture_does_not_compute_is_said(family: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence + ".*; export with --to hf$"):
        architecture_of(tiny_config(family, **changes))


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def misshapen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))


def diverged(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def foreign_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.extra.weight": torch.ones(3)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lacking, r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"),
        (misshapen, r"has shape \[52, 40\], but its config.json asks for \[50, 40\]"),
        (diverged, "model.norm.weight holds values that are not finite"),
        (sharded, "lacks model-00002-of-00002.safetensors"),
        (of_another_kind, "models of type 'gpt2' cannot be exported; this writes llama, mistral, qwen2, qwen3"),
        (foreign_weight, "holds the weight model.extra.weight, which a llama model does not have"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load a tokenizer"),
    ],
)
def test_damaged_folders_get_one_sentence_and_leave_no_file(
    make_model: Any, tmp_path: Path, damage: Any, sentence: str
) -> None:
    folder, _ = make_model("llama-gqa")
    damage(folder)
    with pytest.raises(UsageError, match=sentence) as raised:
        write(folder, out=tmp_path / "x" / "m.gguf")
    assert "\n" not in str(raised.value)
    assert not [path for path in tmp_path.rglob("*gguf*") if path.is_file()]


def test_values_beyond_f16_are_named(make_model: Any) -> None:
    folder, _ = make_model("llama-gqa")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"up_proj.weight holds values beyond the range of f16; choose --type bf16"):
        write(folder, "f16")


def test_an_unknown_type_lists_the_known_ones(make_model: Any) -> None:
    folder, _ = make_model("llama-gqa")
    with pytest.raises(UsageError, match=r"no type q9_0; written are f32, f16, .*q4_k_m"):
        write(folder, "q9_0")
