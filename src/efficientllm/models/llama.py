"""Llama (also SmolLM, TinyLlama, Llama 2 and 3): no biases, rotary attention, gated FFN."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from efficientllm.models import mistral
from efficientllm.models.layer import LAYER_AXES
from efficientllm.pruning.widths import Widths


class Llama:
    model_type = "llama"

    def layer_axes(self, config: PretrainedConfig) -> dict[str, tuple[str | int, ...]]:
        return LAYER_AXES

    def norm_inputs(self) -> tuple[str, ...]:
        return ()

    def refusal(self, config: PretrainedConfig) -> tuple[str, str] | None:
        if config.attention_bias or config.mlp_bias:
            return (
                "it has attention or FFN biases",
                ", which Mistral, the class that carries pruned Llama shapes, lacks; use a source without them",
            )
        return None

    def narrow(self, values: dict[str, Any], widths: Widths) -> PretrainedConfig:
        """Llama where LlamaConfig allows the shape (hidden a multiple of the heads), else Mistral.

        The two have the same weights by the same names and compute the same function; MistralConfig takes any
        shape with an explicit head_dim (transformers 5).
        """
        if widths.hidden % widths.heads == 0:
            return LlamaConfig(**values)
        for key in ("pretraining_tp", "attention_bias", "mlp_bias"):
            values.pop(key, None)
        return mistral.Mistral().narrow(values | {"sliding_window": None}, widths)
