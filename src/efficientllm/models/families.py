"""The families, one row each (family.py). A new one is a row here, and one in FAMILIES of tests/conftest.py."""

from __future__ import annotations

from typing import Any

from efficientllm.models.family import (
    ATTENTION,
    FFN_BIASES,
    FIELDS,
    GATED,
    HEAD_NORMS,
    LAYER,
    MIXTURE_LAYER,
    O_BIAS,
    QKV_BIASES,
    Axes,
    Carrier,
    Family,
)
from efficientllm.pruning.dimensions import FFN, HIDDEN, KV, QUERY

_ANY_SHAPE = Carrier(
    "mistral", without=("pretraining_tp", "attention_bias", "mlp_bias"), values={"sliding_window": None}
)
_REFUSED_BIASES = (
    "it has attention or FFN biases",
    ", which Mistral, the class that carries pruned Llama shapes, lacks; use a source without them",
)
_ATTENTION_BIASES = {"attention_bias": QKV_BIASES | O_BIAS}
_BIASES = _ATTENTION_BIASES | {"mlp_bias": FFN_BIASES}
_QK_NORMS = {"self_attn.q_norm": ("self_attn.q_proj",), "self_attn.k_norm": ("self_attn.k_proj",)}
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")

# Norms after the sublayers alone, and over all heads of q and of k (OLMo 2, arXiv 2501.00656, sec. 3).
_OLMO: Axes = {
    **ATTENTION,
    "self_attn.q_norm.weight": (QUERY,),
    "self_attn.k_norm.weight": (KV,),
    "post_attention_layernorm.weight": (HIDDEN,),
    **GATED,
    "post_feedforward_layernorm.weight": (HIDDEN,),
}
# Norms before and after the sublayers (Gemma 2, arXiv 2408.00118, sec. 2), gains of 1 + w, scaled embeddings.
_GEMMA: Axes = {
    "input_layernorm.weight": (HIDDEN,),
    **ATTENTION,
    "post_attention_layernorm.weight": (HIDDEN,),
    "pre_feedforward_layernorm.weight": (HIDDEN,),
    **GATED,
    "post_feedforward_layernorm.weight": (HIDDEN,),
}
_OF_GEMMA: dict[str, Any] = {"closing": _AFTER, "offset": 1.0, "root_scaled": True, "whole": True}
_PHI: Axes = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.qkv_proj.weight": ((QUERY, KV, KV), HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, QUERY),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_up_proj.weight": ((FFN, FFN), HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, FFN),
}

_SHARED_FIELDS = {width: name for width, name in FIELDS.items() if width != "intermediate"}  # of mixtures of experts

_ROWS = (
    # Also SmolLM, TinyLlama, Llama 2 and 3. transformers 5 refuses most pruned shapes of Llamas, and none of Mistrals.
    Family(
        "llama",
        carrier=_ANY_SHAPE,
        refused={"attention_bias": _REFUSED_BIASES, "mlp_bias": _REFUSED_BIASES},
        gguf="llama",
    ),
    Family("mistral", gguf="llama"),
    Family("qwen2", LAYER | QKV_BIASES, gguf="qwen2"),  # also Qwen2.5
    Family("qwen3", LAYER | HEAD_NORMS, optional=_ATTENTION_BIASES, normed=_QK_NORMS, gguf="qwen3"),
    Family("smollm3", optional=_BIASES, gguf="smollm3"),
    Family("granite", optional=_BIASES, gguf="granite"),
    Family("olmo2", _OLMO, optional=_ATTENTION_BIASES, normed=_QK_NORMS, closing=_AFTER, gguf="olmo2"),
    Family("olmo3", _OLMO, optional=_ATTENTION_BIASES, normed=_QK_NORMS, closing=_AFTER, gguf="olmo2"),
    Family("gemma2", _GEMMA, optional=_ATTENTION_BIASES, eager=True, gguf="gemma2", **_OF_GEMMA),
    Family(
        "gemma3_text", _GEMMA | HEAD_NORMS, optional=_ATTENTION_BIASES, normed=_QK_NORMS, gguf="gemma3", **_OF_GEMMA
    ),
    Family("phi3", _PHI, long_rotary=True, gguf="phi3"),  # also Phi-4-mini
    Family(
        "qwen3_moe",
        layer=MIXTURE_LAYER | HEAD_NORMS,
        optional=_ATTENTION_BIASES,
        normed=_QK_NORMS,
        fields=_SHARED_FIELDS | {"experts": "num_local_experts", "expert_intermediate": "moe_intermediate_size"},
        gguf="qwen3moe",
    ),
    Family(
        "olmoe",
        layer=MIXTURE_LAYER | {"self_attn.q_norm.weight": (QUERY,), "self_attn.k_norm.weight": (KV,)},
        normed=_QK_NORMS,
        fields=_SHARED_FIELDS | {"experts": "num_experts", "expert_intermediate": "intermediate_size"},
        refused={"attention_bias": ("it has attention biases", "; use a source without them")},
        square=True,
        gguf="olmoe",
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
