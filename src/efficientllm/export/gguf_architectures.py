"""What llama.cpp computes under each of its architectures' names, one row each, and which of them computes a model.

Read from llama.cpp's src/models/ and held against its logits (tests/export/test_llamacpp.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from efficientllm.errors import UsageError
from efficientllm.models.families import FAMILIES
from efficientllm.models.space import head_dim_of, rope_kind, rope_of

SILU, GELU = ("silu",), ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's code for an architecture expects of a model, beyond what all of them do.

    paired: it rotates neighbouring pairs of a head's channels. partial: it may rotate a part of each head. scaled: it
    divides the rotary frequencies by those of `rope_freqs.weight`, Llama 3's scaling. rope_kinds: other kinds of
    scaling that it does.
    square: it takes heads x head_dim only where that is the hidden size; oblong: the architecture that takes others.
    lacks: fields of the config for which it has no weights. fused: q, k and v are one weight, gate and up another.
    head: whether it has an LM head of its own: always, never,
    or (None) where the model has.
    activations: of the FFN. period: layers whose number, from 1, is a multiple of it attend to everything, or have no
    rotary positions, the others a window or have them; None: it computes all layers alike, without a window.
    local: layers with a window may have rotary positions of another base.
    entries: metadata from fields of the config, by GGUFWriter's method.
    query: weights by which the queries are multiplied where the scores are divided by another root than that of
    head_dim; large: the number of layers at which it divides by the root of hidden // heads instead.
    grouped: whether query heads may share a KV head. normalised: whether it divides the weights of a token's experts by
    their sum; None: it has no experts.
    """

    paired: bool = False
    partial: bool = False
    scaled: bool = False
    rope_kinds: tuple[str, ...] = ()
    square: bool = False
    oblong: str | None = None
    lacks: tuple[str, ...] = ()
    fused: bool = False
    head: bool | None = None
    activations: tuple[str, ...] = SILU
    period: int | None = None
    local: bool = False
    entries: Mapping[str, str] = field(default_factory=dict)
    query: str | None = None
    large: int | None = None
    grouped: bool = True
    normalised: bool | None = None


_CAPS = {
    "add_attn_logit_softcapping": "attn_logit_softcapping",
    "add_final_logit_softcapping": "final_logit_softcapping",
}
_WINDOW = {"add_sliding_window": "sliding_window"}
_MULTIPLIERS = {
    "add_embedding_scale": "embedding_multiplier",
    "add_residual_scale": "residual_multiplier",
    "add_attention_scale": "attention_multiplier",
    "add_logit_scale": "logits_scaling",
}
# By llama.cpp's name, which a family's row has (models/families.py).
ARCHITECTURES = {
    "llama": Architecture(paired=True, scaled=True),
    "qwen2": Architecture(square=True, oblong="llama"),
    "qwen3": Architecture(lacks=("attention_bias",)),
    "smollm3": Architecture(paired=True, period=4, lacks=("use_sliding_window",)),
    "granite": Architecture(paired=True, entries=_MULTIPLIERS),
    "olmo2": Architecture(square=True, head=True, period=4, entries=_WINDOW, lacks=("attention_bias",)),
    "gemma2": Architecture(
        head=False,
        activations=GELU,
        period=2,
        entries=_WINDOW | _CAPS,
        lacks=("attention_bias",),
        query="self_attn.q_proj",
        large=46,
    ),
    "gemma3": Architecture(
        rope_kinds=("linear",),
        activations=GELU,
        period=6,
        local=True,
        entries=_WINDOW,
        lacks=("attention_bias", "final_logit_softcapping"),
        query="self_attn.q_norm",
        large=62,
    ),
    "qwen3moe": Architecture(lacks=("attention_bias", "use_sliding_window"), normalised=True),
    "olmoe": Architecture(square=True, grouped=False, head=True, lacks=("clip_qkv",), normalised=False),
    "phi3": Architecture(square=True, oblong="llama", fused=True, partial=True, rope_kinds=("longrope",)),
}


def architecture_of(config: PretrainedConfig) -> str:
    """The llama.cpp architecture that computes this model, a key of ARCHITECTURES.

    llama.cpp's qwen2 and phi3 have no room for heads x head_dim other than the hidden size; its llama takes biases and
    any head_dim, so that one whose stem was pruned goes there. Raises UsageError for what none of them computes.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.gguf is None:
        raise UsageError(f"models of type '{config.model_type}' are not written to GGUF; export with --to hf")
    name, rows = family.gguf, ARCHITECTURES[family.gguf]
    width = config.num_attention_heads * head_dim_of(config)
    if rows.square and width != config.hidden_size and rows.oblong:
        name, rows = rows.oblong, ARCHITECTURES[rows.oblong]
    reason = _reason(config, rows, name, width)
    if reason:
        raise UsageError(f"{reason}; export with --to hf")
    return name


def _reason(config: PretrainedConfig, rows: Architecture, name: str, width: int) -> str | None:
    """Why llama.cpp does not compute this model under that name; None where it does."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in rows.activations:
        called = "SiLU" if rows.activations == SILU else rows.activations[0]
        return f"llama.cpp computes these models with {called}, this one has hidden_act={activation}"
    if not rows.partial and (rope_of(config).get("partial_rotary_factor") or 1.0) != 1.0:
        return "llama.cpp rotates whole heads in these models, this one has a partial_rotary_factor"
    for flag in rows.lacks:
        if getattr(config, flag, None):
            return f"llama.cpp's {name} has nothing for {flag}, which this model sets"
    if not rows.grouped and config.num_key_value_heads != config.num_attention_heads:
        return f"llama.cpp's {name} has a KV head for every query head, and in this model they are shared"
    if rows.normalised is not None and rows.normalised != config.norm_topk_prob:
        return f"llama.cpp's {name} has norm_topk_prob {str(rows.normalised).lower()}, and this model the opposite"
    if rows.square and width != config.hidden_size:
        return f"llama.cpp's {name} takes heads x head_dim ({width}) only as the hidden size ({config.hidden_size})"
    if rows.head is not None and rows.head == config.tie_word_embeddings:
        return (
            f"llama.cpp's {name} {'lacks' if config.tie_word_embeddings else 'has no room for'} an LM head of its own"
        )
    for field_name in rows.entries.values():
        if field_name != "sliding_window" and getattr(config, field_name, None) is None:
            return f"llama.cpp's {name} needs a number for {field_name}, of which this model has none"
    local, everywhere = (rope_theta(config, kind) for kind in ("sliding_attention", "full_attention"))
    if rope_kind(config, "sliding_attention") != rope_kind(config) != "linear" or (
        local != everywhere and not rows.local
    ):
        return f"llama.cpp's {name} has the same rotary positions in all layers, this model has not"
    layers, period = _special_layers(config, rows), rows.period or 1
    wanted = [place for place in range(config.num_hidden_layers) if (place + 1) % period == 0]
    if layers is not None and layers != wanted:
        what = "window" if "add_sliding_window" in rows.entries else "rotary positions"
        return f"in llama.cpp's {name} layers {wanted} (from 0) have no {what}, in this model layers {layers}"
    return None


def _special_layers(config: PretrainedConfig, rows: Architecture) -> list[int] | None:
    """The layers, from 0, that attend to everything where others have a window, or that have no rotary positions, as
    the architecture has them; None where the model or the architecture has them all alike."""
    if rows.period is None:
        return None
    if "add_sliding_window" in rows.entries:
        kinds = getattr(config, "layer_types", None)
        return kinds and [place for place, kind in enumerate(kinds) if kind == "full_attention"]
    return [place for place, rotates in enumerate(config.no_rope_layers) if not rotates]


def context_length(config: PretrainedConfig, architecture: str) -> int:
    """Positions within which llama.cpp computes what transformers does: where it attends to everything although the
    model has a window, those in the window."""
    window, length = _window(config), int(config.max_position_embeddings)
    return (
        length if window is None or "add_sliding_window" in ARCHITECTURES[architecture].entries else min(window, length)
    )


def _window(config: PretrainedConfig) -> int | None:
    """The sliding window of attention, None where there is none."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None or getattr(config, "use_sliding_window", True) is False else int(window)


def entries_of(config: PretrainedConfig, architecture: str) -> Sequence[tuple[str, Any]]:
    """(GGUFWriter's method, value) of what the architecture is told beyond what all are."""
    rows = ARCHITECTURES[architecture]
    found = [(method, getattr(config, name, None)) for method, name in rows.entries.items()]
    entries = [(method, value) for method, value in found if value is not None]
    if rope_kind(config) == "linear" and "linear" in rows.rope_kinds:
        entries += [("add_rope_scaling_type", "linear"), ("add_rope_scaling_factor", float(rope_of(config)["factor"]))]
    if rope_kind(config) == "longrope" and "longrope" in rows.rope_kinds:
        _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        original = int(rope_of(config)["original_max_position_embeddings"])
        entries += [("add_rope_scaling_orig_ctx_len", original), ("add_rope_scaling_attn_factors", float(attention))]
    if rows.local:
        entries.append(("add_rope_freq_base_swa", rope_theta(config, "sliding_attention")))
    return entries


def query_factor(config: PretrainedConfig, rows: Architecture) -> float:
    """What queries are multiplied by for an architecture that divides scores by the root of head_dim, in a model that
    divides them by the root of query_pre_attn_scalar."""
    theirs = head_dim_of(config)
    if config.num_hidden_layers == rows.large:
        theirs = config.hidden_size // config.num_attention_heads
    return math.sqrt(theirs / config.query_pre_attn_scalar)


def rotary_channels(config: PretrainedConfig) -> int:
    """Channels of a head that are rotated."""
    return int(head_dim_of(config) * float(rope_of(config).get("partial_rotary_factor") or 1.0))


def rope_theta(config: PretrainedConfig, layers: str = "full_attention") -> float:
    value = rope_of(config, layers).get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    return float(str(value))
