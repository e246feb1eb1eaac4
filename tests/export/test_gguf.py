"""GGUF files read back by the gguf package: names, shapes, values, metadata."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config

gguf = pytest.importorskip("gguf")

from conftest import FAMILIES, tiny_config  # noqa: E402
from efficientllm.errors import UsageError  # noqa: E402
from efficientllm.export.gguf_architectures import ARCHITECTURES, architecture_of  # noqa: E402
from efficientllm.export.gguf_tensors import misfits, paired  # noqa: E402
from efficientllm.models.families import FAMILIES as ROWS  # noqa: E402
from export.gguf_files import LLAMA3, field, write  # noqa: E402

WRITTEN = [name for name, (kind, _) in FAMILIES.items() if kind.model_type in ("llama", "mistral", "qwen2", "qwen3")]
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def transformers_name(name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"model.layers.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"
    stem, part = name.rsplit(".", 1)
    return f"{NAMES[stem]}.{part}"


def halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """The rows of every head from pairs back to halves, one by one."""
    out = np.empty_like(weight)
    for row in range(weight.shape[0]):
        head, place = divmod(row, head_dim)
        out[head * head_dim + place // 2 + (place % 2) * (head_dim // 2)] = weight[row]
    return out


@pytest.mark.parametrize(
    ("family", "changes", "architecture"),
    [
        *[(family, {}, "qwen3" if family.startswith("qwen3") else "llama") for family in WRITTEN],
        ("qwen2-gqa-tied", {"head_dim": 10}, "qwen2"),
        ("qwen3-gqa", {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}, "qwen3"),
    ],
)
def test_every_weight_comes_back_bit_for_bit(
    make_model: Any, family: str, changes: dict[str, Any], architecture: str
) -> None:
    folder, model = make_model(family, **changes)
    reader, said = write(folder)
    config = model.config
    head_dim = config.head_dim
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    read = {}
    for tensor in reader.tensors:
        name = transformers_name(tensor.name)
        turned = architecture == "llama" and re.search(r"attn_[qk]\.", tensor.name)
        read[name] = halves(tensor.data, head_dim) if turned else tensor.data
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensor.shape) == list(reversed(weights[name].shape))
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(read[name], weight, err_msg=name)
    assert field(reader, "general.architecture") == architecture
    wanted = {
        "context_length": 256,
        "embedding_length": config.hidden_size,
        "block_count": 2,
        "feed_forward_length": 52,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 10000.0,
        "vocab_size": 300,
    }
    assert {key: field(reader, f"{architecture}.{key}") for key in wanted} == wanted
    assert field(reader, f"{architecture}.attention.layer_norm_rms_epsilon") == pytest.approx(config.rms_norm_eps)
    assert field(reader, "tokenizer.ggml.tokens")[0] == "<|endoftext|>"
    assert all("llama.cpp" in note or "transformers" in note for note in said)


def test_pairs_are_undone_by_halves() -> None:
    weight = torch.randn(3 * 10, 4)
    assert not torch.equal(paired(weight, 3), weight)
    np.testing.assert_array_equal(halves(paired(weight, 3).numpy(), 10), weight.numpy())


# Half a step of the coarsest block, as a share of the largest value in it (Q4_0 and Q5_0 clip one end: a whole step).
BOUNDS = {
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 0.5 / 127,
    "q5_1": 1 / 31,
    "q5_0": 1 / 16,
    "q4_1": 1 / 15,
    "q4_0": 1 / 8,
}


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_quantised_values_stay_within_half_a_step(make_model: Any, kind: str) -> None:
    folder, model = make_model("llama-gqa", hidden_size=64, intermediate_size=96, head_dim=32)
    reader, said = write(folder, kind)
    assert not said
    asked = gguf.GGMLQuantizationType[kind.upper()]
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    quantised = 0
    for tensor in reader.tensors:
        weight = weights[transformers_name(tensor.name)]
        if weight.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            continue
        is_head = tensor.name == "output.weight"
        at_head = gguf.GGMLQuantizationType.Q8_0 if kind.startswith("q") else asked
        assert tensor.tensor_type == (at_head if is_head else asked)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        if re.search(r"attn_[qk]\.", tensor.name):
            values = halves(values, 32)
        blocks, want = values.reshape(-1, 32), weight.reshape(-1, 32)
        largest = np.abs(want).max(axis=1, keepdims=True)
        bound = BOUNDS["q8_0" if is_head and kind.startswith("q") else kind] + 2**-10  # the scale itself is an f16
        assert (np.abs(blocks - want) <= bound * largest).all(), tensor.name
        assert kind == "f16" or not np.array_equal(blocks, want)
        quantised += 1
    assert quantised == 2 * 7 + 2
    assert field(reader, "general.quantization_version") == 2
    assert field(reader, "general.file_type") == int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])


def test_rows_that_do_not_fit_become_f16_and_are_named(make_model: Any) -> None:
    folder, _ = make_model("llama-mha-tied", hidden_size=40, intermediate_size=64, head_dim=8)
    reader, said = write(folder, "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == types["blk.1.attn_output.weight"] == "Q8_0"
    assert len(said) == 1
    assert "hidden size 40 is no multiple of 32" in said[0]
    assert "prune.align=32" in said[0]


def test_a_k_quant_leaves_the_f16_file_and_the_command(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa", hidden_size=256, intermediate_size=96, head_dim=64, num_attention_heads=4)
    reader, said = write(folder, "q4_k_m", out=tmp_path / "it-f16.gguf")
    assert field(reader, "general.file_type") == int(gguf.LlamaFileType.MOSTLY_F16)
    assert len(said) == 2
    assert said[0].startswith(
        "FFN width 96 is no multiple of 256: matrices with such rows become q5_0 instead of q4_k_m"
    )
    assert "prune.align=256" in said[0]
    assert said[1].endswith(f"llama-quantize {tmp_path}/it-f16.gguf {tmp_path}/it-q4_k_m.gguf Q4_K_M")


@pytest.mark.parametrize(
    ("kind", "instead"), [("q2_k", "q4_0"), ("q3_k_l", "q4_0"), ("q5_k_m", "q5_1"), ("q6_k", "q8_0")]
)
def test_what_llamacpp_falls_back_to_is_named(kind: str, instead: str) -> None:
    config = tiny_config("llama-gqa", hidden_size=96, intermediate_size=256, head_dim=64)
    (said,) = misfits(config, kind)
    assert f"become {instead} instead of {kind}" in said
    (said, *_) = misfits(tiny_config("llama-gqa", hidden_size=100, intermediate_size=256, head_dim=64), kind)
    assert f"become f16 instead of {kind}" in said


def test_every_family_that_can_be_pruned_has_an_architecture_in_llamacpp() -> None:
    assert {row.gguf for row in ROWS.values() if row.gguf} == ARCHITECTURES.keys()
    with pytest.raises(UsageError, match="models of type 'gpt2' are not written to GGUF"):
        architecture_of(GPT2Config())


def test_the_end_of_text_is_taken_from_config_json_where_nothing_else_names_it(make_model: Any) -> None:
    folder, _ = make_model("llama-gqa", eos_token_id=[5, 9])
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key != "eos_token"})
    )
    reader, _ = write(folder)
    assert field(reader, "tokenizer.ggml.eos_token_id") == 5
    assert field(reader, "tokenizer.ggml.eot_token_id") == 9


def test_the_command_for_a_k_quant_can_be_pasted_into_a_shell(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama-gqa")
    _, said = write(folder, "q6_k", out=tmp_path / "my models" / "it's-f16.gguf")
    arguments = shlex.split(said[-1].split("f16 file: ")[1])
    home = tmp_path / "my models"
    assert arguments == ["llama-quantize", f"{home}/it's-f16.gguf", f"{home}/it's-q6_k.gguf", "Q6_K"]


def test_llama3_scaling_divides_the_frequencies_that_transformers_uses(make_model: Any) -> None:
    folder, model = make_model("llama-gqa", head_dim=32, rope_parameters=LLAMA3)
    reader, _ = write(folder)
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 1.0 / 5000.0 ** (np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(8.0)


def test_a_sliding_window_bounds_the_context(make_model: Any) -> None:
    folder, _ = make_model("mistral-gqa-tied", sliding_window=128)
    reader, said = write(folder)
    assert field(reader, "llama.context_length") == 128
    assert any("sliding window of 128" in note for note in said)


def test_scores_put_merges_in_the_order_of_the_list() -> None:
    """llama.cpp merges the pair whose product scores highest; the list's first merge must be that."""
    from efficientllm.export.gguf_tokenizer import _scores

    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    pairs = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
    scores = dict(zip(tokens, _scores(tokens, pairs), strict=True))
    assert scores["bc"] > scores["ab"] > scores["abc"]
    with pytest.raises(UsageError, match="never merges 'ab' and 'c'"):
        _scores(tokens, pairs[:3])
