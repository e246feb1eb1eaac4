"""The protocol of a model family, and the registry."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PretrainedConfig

from efficientllm.errors import UsageError
from efficientllm.pruning.widths import Widths

Refusal = tuple[str, str]  # a fact, as a clause of its own, and how a sentence about pruning goes on after it


class Adapter(Protocol):
    """What pruning must be told about a family of pre-norm RMSNorm decoders.

    `layer_axes` names every weight of one layer, relative to `model.layers.N.`, with the axis of each dimension
    (pruning/groups.py); weights outside the layers are the same in all families (models/space.py).
    """

    model_type: str

    def layer_axes(self, config: PretrainedConfig) -> dict[str, tuple[str | int, ...]]: ...

    def norm_inputs(self) -> tuple[str, ...]:
        """Weights of a layer that feed a norm sharing the stem's epsilon off the hidden axis."""
        ...

    def refusal(self, config: PretrainedConfig) -> Refusal | None:
        """What this particular configuration has that cannot be pruned, and why or what to do; None where it can."""
        ...

    def narrow(self, values: dict[str, Any], widths: Widths) -> PretrainedConfig:
        """A config of these widths from the source's config as a dict, its widths and epsilon already replaced."""
        ...


def registry() -> dict[str, Adapter]:
    """Adapters by transformers' `model_type`."""
    from efficientllm.models import llama, mistral, qwen2, qwen3

    adapters: tuple[Adapter, ...] = (llama.Llama(), mistral.Mistral(), qwen2.Qwen2(), qwen3.Qwen3())
    return {adapter.model_type: adapter for adapter in adapters}


def adapter_for(config: PretrainedConfig, use: str = "pruned") -> Adapter:
    """The adapter of a model's family. Raises UsageError listing the supported families, or what is in the way.

    use: what is to be done with the model, for the sentence.
    """
    adapters = registry()
    model_type = getattr(config, "model_type", "unknown")
    if model_type not in adapters:
        known = ", ".join(adapters)
        raise UsageError(f"models of type '{model_type}' are not supported; choose a source of one of: {known}")
    adapter = adapters[model_type]
    reason = adapter.refusal(config) or _common_refusal(config)
    if reason:
        fact, rest = reason
        if use != "pruned":
            rest = "; only models that could be pruned are supported here"
        raise UsageError(f"this {model_type} model cannot be {use}: {fact}{rest}")
    return adapter


def _common_refusal(config: PretrainedConfig) -> Refusal | None:
    if getattr(config, "quantization_config", None):
        return "its weights are quantised", "; use the unquantised checkpoint"
    if getattr(config, "attention_dropout", 0.0):
        return "attention_dropout is not 0 in its config.json", "; set it to 0.0, since a run must be repeatable"
    return None
