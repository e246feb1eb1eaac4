"""The weights of one layer that all supported families share, with the axis of each dimension."""

from __future__ import annotations

from efficientllm.pruning.dimensions import FFN, HIDDEN, KV, QUERY

LAYER_AXES: dict[str, tuple[str | int, ...]] = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (QUERY, HIDDEN),
    "self_attn.k_proj.weight": (KV, HIDDEN),
    "self_attn.v_proj.weight": (KV, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, QUERY),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, FFN),
}

QKV_BIAS_AXES: dict[str, tuple[str | int, ...]] = {
    "self_attn.q_proj.bias": (QUERY,),
    "self_attn.k_proj.bias": (KV,),
    "self_attn.v_proj.bias": (KV,),
}
