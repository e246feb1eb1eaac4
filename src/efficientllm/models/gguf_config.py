"""The configuration of a GGUF file's model, in the transformers family that computes what llama.cpp does with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from efficientllm.errors import UsageError
from efficientllm.models.gguf_vocabulary import special_ids

Tensors = dict[str, gguf.ReaderTensor]

ROPE_FREQUENCIES = "rope_freqs.weight"
_LOW, _HIGH = 1.0, 4.0  # frequency factors of every Llama 3
_ENTRIES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}


def config_of(fields: Mapping[str, Any], tensors: Tensors) -> PretrainedConfig:
    """From a file's metadata and tensors by name. Raises UsageError, a clause, for what is not read here."""
    architecture = str(fields.get("general.architecture"))
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise UsageError(f"its architecture '{architecture}' is none of llama, qwen2 and qwen3")

    def entry(name: str, default: Any = None) -> Any:
        value = fields.get(f"{architecture}.{name}", default)
        if isinstance(value, list):
            raise UsageError(f"its {name} is not the same in every layer")
        if value is None:
            raise UsageError(f"it does not say its {name}")
        return value

    values: dict[str, Any] = {name: int(entry(key)) for name, key in _ENTRIES.items()}
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if min(values.values()) < 1:
        raise UsageError(f"its {_ENTRIES[min(values, key=values.__getitem__)]} is no positive number")
    head_dim = int(entry("attention.key_length", hidden // heads))
    if entry("rope.dimension_count", head_dim) != head_dim or entry("attention.value_length", head_dim) != head_dim:
        raise UsageError("it rotates a part of each head, or its values have another size than its keys")
    if entry("rope.scaling.type", "none") != "none" or entry("rope.scale_linear", 1.0) != 1.0:
        raise UsageError("it scales its rotary positions in a way that is not read here (only Llama 3's is)")
    if "token_embd.weight" not in tensors:
        raise UsageError("it lacks token_embd.weight")
    ids = special_ids(fields)
    theta = _decimal(entry("rope.freq_base", 10000.0))
    values |= {
        "num_key_value_heads": int(entry("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "rms_norm_eps": _decimal(entry("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    } | {f"{kind}_token_id": ids.get(kind) for kind in ("bos", "eos", "pad")}
    if ROPE_FREQUENCIES in tensors:
        values["rope_scaling"] = _llama3_scaling(tensors[ROPE_FREQUENCIES], theta, head_dim)
    try:
        return _of_family(architecture, values, biased="blk.0.attn_q.bias" in tensors)
    except Exception as error:  # transformers' validators raise types of their own
        raise UsageError(f"transformers refuses its configuration ({str(error).splitlines()[-1]})") from error


def _of_family(architecture: str, values: dict[str, Any], *, biased: bool) -> PretrainedConfig:
    """llama.cpp's llama takes biases, which in transformers Qwen2 has, and any shape, which Mistral has."""
    if architecture == "qwen3":
        config: PretrainedConfig = Qwen3Config(**values)
    elif architecture == "qwen2" or biased:
        config = Qwen2Config(**values)
    elif values["hidden_size"] % values["num_attention_heads"]:
        config = MistralConfig(**values, sliding_window=None)
    else:
        config = LlamaConfig(**values)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    return config


def _decimal(value: float) -> float:
    """The shortest decimal with the same fp32 value: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama3_scaling(tensor: gguf.ReaderTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's rotary scaling from the divisors of the frequencies (head_dim / 2,), which is all that a file holds.

    The largest is the factor; one between it and 1 gives the length of the original context. Raises UsageError where
    these do not give the divisors back.
    """
    divisors = np.asarray(tensor.data, dtype=np.float64).reshape(-1)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor, length = _decimal(divisors.max()), 8192
    between = np.flatnonzero((divisors > 1.0 + 1e-3) & (divisors < factor * (1 - 1e-3)))
    if between.size:
        place = between[between.size // 2]
        smooth = (1 / divisors[place] - 1 / factor) / (1 - 1 / factor)
        length = round(wavelengths[place] * (_LOW + smooth * (_HIGH - _LOW)))
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": length,
    }
    settings: dict[str, Any] = {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": dict(scaling)}
    config = LlamaConfig(**settings)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not np.allclose(2 * math.pi / wavelengths / frequencies.double().numpy(), divisors, rtol=1e-4):
        raise UsageError("its rope_freqs.weight is no rotary scaling of Llama 3's kind, the only one that is read here")
    return scaling
