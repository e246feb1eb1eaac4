"""Qwen2 and Qwen2.5: Llama's weights and biases on q, k and v."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2Config

from efficientllm.models.layer import LAYER_AXES, QKV_BIAS_AXES
from efficientllm.pruning.widths import Widths


class Qwen2:
    model_type = "qwen2"

    def layer_axes(self, config: PretrainedConfig) -> dict[str, tuple[str | int, ...]]:
        return LAYER_AXES | QKV_BIAS_AXES

    def norm_inputs(self) -> tuple[str, ...]:
        return ()

    def refusal(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return None

    def narrow(self, values: dict[str, Any], widths: Widths) -> PretrainedConfig:
        return Qwen2Config(**values)
