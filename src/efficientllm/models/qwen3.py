"""Qwen3: Llama's weights and an RMSNorm over head_dim on every query and key head."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from efficientllm.models.layer import LAYER_AXES, QKV_BIAS_AXES
from efficientllm.pruning.dimensions import HIDDEN
from efficientllm.pruning.widths import Widths


class Qwen3:
    model_type = "qwen3"

    def layer_axes(self, config: PretrainedConfig) -> dict[str, tuple[str | int, ...]]:
        head_dim = config.head_dim
        axes = LAYER_AXES | {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        if config.attention_bias:
            axes = axes | QKV_BIAS_AXES | {"self_attn.o_proj.bias": (HIDDEN,)}
        return axes

    def norm_inputs(self) -> tuple[str, ...]:
        """q and k are normalised per head with the stem's epsilon."""
        return tuple(f"self_attn.{name}_proj.{part}" for name in "qk" for part in ("weight", "bias"))

    def refusal(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return None

    def narrow(self, values: dict[str, Any], widths: Widths) -> PretrainedConfig:
        return Qwen3Config(**values)
