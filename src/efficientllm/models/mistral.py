"""Mistral: Llama's weights, an optional sliding window, any shape with an explicit head_dim."""

from __future__ import annotations

from typing import Any

from transformers import MistralConfig, PretrainedConfig

from efficientllm.models.layer import LAYER_AXES
from efficientllm.pruning.widths import Widths


class Mistral:
    model_type = "mistral"

    def layer_axes(self, config: PretrainedConfig) -> dict[str, tuple[str | int, ...]]:
        return LAYER_AXES

    def norm_inputs(self) -> tuple[str, ...]:
        return ()

    def refusal(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return None

    def narrow(self, values: dict[str, Any], widths: Widths) -> PretrainedConfig:
        return MistralConfig(**values)
