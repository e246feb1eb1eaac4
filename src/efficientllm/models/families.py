"""The families, one row each (family.py). A new one is a row here, and one in FAMILIES of tests/conftest.py."""

from __future__ import annotations

from efficientllm.models.family import HEAD_NORMS, LAYER, QKV_BIASES, Carrier, Family
from efficientllm.pruning.dimensions import HIDDEN

_ANY_SHAPE = Carrier(
    "mistral", without=("pretraining_tp", "attention_bias", "mlp_bias"), values={"sliding_window": None}
)
_BIASES = (
    "it has attention or FFN biases",
    ", which Mistral, the class that carries pruned Llama shapes, lacks; use a source without them",
)

_ROWS = (
    # Also SmolLM, TinyLlama, Llama 2 and 3. transformers 5 refuses most pruned shapes of Llamas, and none of Mistrals.
    Family("llama", carrier=_ANY_SHAPE, refused={"attention_bias": _BIASES, "mlp_bias": _BIASES}, gguf="llama"),
    Family("mistral", gguf="llama"),
    Family("qwen2", layer=LAYER | QKV_BIASES, gguf="qwen2"),  # also Qwen2.5
    Family(
        "qwen3",
        layer=LAYER | HEAD_NORMS,
        optional={"attention_bias": QKV_BIASES | {"self_attn.o_proj.bias": (HIDDEN,)}},
        normed={"self_attn.q_norm": ("self_attn.q_proj",), "self_attn.k_norm": ("self_attn.k_proj",)},
        gguf="qwen3",
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
