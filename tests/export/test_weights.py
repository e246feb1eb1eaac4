"""Which of a folder's weights count, where transformers itself must choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from efficientllm.errors import UsageError
from efficientllm.export.weights import Weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_every_family_s_folder_is_whole(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    weights, want = Weights(tmp_path), load_file(tmp_path / "model.safetensors")
    assert weights.shapes == {name: tuple(weight.shape) for name, weight in want.items()}
    assert all(torch.equal(weights.read(name), weight) for name, weight in want.items())


def test_a_head_beside_tied_embeddings_is_read_only_where_it_is_the_same(make_model: Any) -> None:
    folder, _ = make_model("llama-mha-tied")
    weights = load_file(folder / "model.safetensors")
    same = weights | {HEAD: weights[EMBEDDING].clone()}
    save_file(same, folder / "model.safetensors", metadata={"format": "pt"})
    assert HEAD not in Weights(folder).shapes
    save_file(same | {HEAD: same[HEAD] * 2}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r'lm_head\.weight differs from .*set "tie_word_embeddings" to false'):
        Weights(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(Weights(folder).read(HEAD), same[HEAD] * 2)


def test_a_stale_index_beside_a_whole_file_is_not_followed(make_model: Any) -> None:
    """As in transformers, which looks for the single file first."""
    folder, _ = make_model("llama-gqa")
    weights = load_file(folder / "model.safetensors")
    old = "model-00001-of-00001.safetensors"
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / old, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, old)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    read = Weights(folder)
    for name in weights:
        assert torch.equal(read.read(name), theirs[name]), name


def test_a_head_of_another_shape_beside_tied_embeddings(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-mha-tied")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {HEAD: torch.ones(3, 40)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="differs"):
        Weights(folder)
