"""Families, the Llama shape trap, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from conftest import tiny_config, tiny_model
from efficientllm.errors import UsageError
from efficientllm.models.loading import load_config, load_model, load_tokenizer
from efficientllm.models.space import build, narrowed_config, of_layers, space_of
from efficientllm.pruning.shapes import fits, fitted
from efficientllm.pruning.widths import Widths

LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]}


def test_llama_becomes_mistral_only_where_llama_refuses_the_shape() -> None:
    config = tiny_config("llama-gqa")
    assert narrowed_config(config, Widths(2, 36, 4, 2, 40)).model_type == "llama"
    odd = narrowed_config(config, Widths(2, 34, 4, 2, 40))
    assert odd.model_type == "mistral"
    assert odd.sliding_window is None
    assert odd.head_dim == 6
    assert odd.rms_norm_eps == pytest.approx(1e-5 * 40 / 34)


def test_narrowing_keeps_everything_else() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = tiny_config("qwen3-gqa", rope_parameters=scaling, tie_word_embeddings=True)
    narrow = narrowed_config(config, Widths(2, 33, 2, 2, 40))
    assert narrow.rope_parameters == config.rope_parameters
    assert narrow.tie_word_embeddings
    assert narrow.max_position_embeddings == config.max_position_embeddings
    assert type(narrow) is type(config)


def test_llama_3_keeps_its_rotary_scaling_whatever_carries_it() -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model("llama-gqa", rope_parameters=scaling)
    odd = build(narrowed_config(model.config, Widths(2, 33, 2, 1, 40)))
    assert odd.config.model_type == "mistral"
    assert odd.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(odd.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not torch.equal(odd.model.rotary_emb.inv_freq, tiny_model("llama-gqa").model.rotary_emb.inv_freq)


def test_lists_by_layer_keep_the_entries_of_the_layers_that_stay() -> None:
    config = tiny_config("smollm3-gqa-tied", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0])
    narrow = narrowed_config(config, Widths(2, 40, 4, 2, 52), of_layers(config.to_dict(), [1, 2]))
    assert narrow.no_rope_layers == [0, 1]


@pytest.mark.parametrize(
    ("family", "changes", "takes"),
    [
        ("gemma2-gqa-tied", {}, lambda hidden, heads: hidden % heads == 0),
        ("gemma3-gqa", {}, lambda hidden, heads: hidden % heads == 0),
        ("phi-gqa", {}, lambda hidden, heads: True),
        ("phi-gqa", {"rope_parameters": LONG, "hidden_size": 26}, lambda hidden, heads: hidden // heads == 6),
    ],
)
def test_shapes_that_fit_are_those_that_transformers_takes(family: str, changes: dict, takes: Callable) -> None:
    """And where the shape of a compaction does not fit, it is padded to the smallest that does."""
    config = tiny_config(family, **changes)
    space = space_of(config)
    for heads in (2, 4):
        for hidden in range(12, config.hidden_size + 1):
            widths = space.widths.changed(hidden=hidden, heads=heads)
            assert fits(space, widths) == takes(hidden, heads)
            narrow = narrowed_config(config, widths)
            assert narrow.hidden_size == hidden
            if takes(hidden, heads):
                assert type(narrow)(**narrow.to_dict()).to_dict() == narrow.to_dict()
            elif hidden // heads != 7:  # transformers counts pairs of channels, and 7 has as many as 6
                with pytest.raises(Exception, match=r"multiple of|must have length"):
                    type(narrow)(**narrow.to_dict())
            padded = fitted(space, widths, space.widths)
            assert fits(space, padded)
            assert all(widths[name] <= padded[name] <= space.widths[name] for name in widths.counts())
            assert (padded == widths) == takes(hidden, heads)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "not supported; choose a source of one of: llama, mistral, qwen2, qwen3, smollm3"),
        (LlamaConfig(attention_bias=True), "biases"),
        (LlamaConfig(attention_dropout=0.1), "attention_dropout"),
    ],
)
def test_unsupported_models_are_refused(config: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        space_of(config)  # type: ignore[arg-type]


def test_what_is_not_to_be_pruned_is_not_told_of_pruning_s_reasons() -> None:
    with pytest.raises(UsageError) as raised:
        space_of(LlamaConfig(attention_bias=True), "exported")
    assert str(raised.value) == (
        "this llama model cannot be exported: it has attention or FFN biases; only models that could be pruned are "
        "supported here"
    )


def test_loading_refuses_what_is_not_whole(tmp_path) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        load_config("./nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot read the configuration"):
        load_config(str(tmp_path / "empty"))
    folder = tmp_path / "model"
    tiny_model("llama-gqa").save_pretrained(folder)
    assert load_model(str(folder)).config.hidden_size == 40
    with pytest.raises(UsageError, match="cannot load a tokenizer"):
        load_tokenizer(str(folder))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot load the weights"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(UsageError, match="cannot load the weights"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha-tied"])
def test_loaded_weights_are_not_the_file_s(tmp_path, name: str) -> None:
    """A map of the file would lie where the file has it, not where torch aligns, and go with the file."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    wanted = dict(model.named_parameters())
    assert {key: weight.data_ptr() % 64 for key, weight in loaded.named_parameters()} == dict.fromkeys(wanted, 0)
    assert all(weight.equal(wanted[key]) for key, weight in loaded.named_parameters())
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_a_missing_weight_is_never_made_up(tmp_path) -> None:
    model = tiny_model("llama-gqa")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UsageError, match=r"lacks the weight .*up_proj"):
        load_model(str(tmp_path))


def test_a_transformers_that_computes_experts_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experts: Any = tiny_model("qwen3-moe-gqa").model.layers[0].mlp.experts
    monkeypatch.delattr(type(experts), "_apply_gate")
    with pytest.raises(UsageError, match=r"has no .*Experts\._apply_gate, which pruning a mixture of experts goes by"):
        build(tiny_config("qwen3-moe-gqa"))
