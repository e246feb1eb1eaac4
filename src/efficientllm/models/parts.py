"""A model's parts by what they do: the same attributes in every family that is known here (family.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
LAYERS_PREFIX = "model.layers."  # before the number of a layer
NORM_WEIGHT = "model.norm.weight"
HEAD_WEIGHT = "lm_head.weight"  # where it is not the embedding's


def body(model: Any) -> nn.Module:
    """All but the LM head: token ids in, last hidden states out."""
    part: nn.Module = model.model
    return part


def final_norm(model: Any) -> nn.Module:
    """What the last layer's state passes before the LM head."""
    part: nn.Module = model.model.norm
    return part


def blocks(model: Any) -> Any:
    """The decoder layers, in order: an nn.ModuleList, whose modules mypy would take for tensors."""
    return model.model.layers


@dataclass(frozen=True)
class Logits:
    """How a model makes logits of its last hidden states h (..., hidden): u = W h / divisor, and where there is a cap
    (Gemma 2, arXiv 2408.00118, sec. 2) cap * tanh(u / cap)."""

    head: nn.Module
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        logits = logits if self.divisor == 1.0 else logits / self.divisor
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


def logits_of(model: Any) -> Logits:
    """By the names that transformers gives to the two in the configs of all families that have them."""
    divisor, cap = (getattr(model.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
    return Logits(model.get_output_embeddings(), float(divisor or 1.0), cap)


def is_recomputed(model: Any) -> bool:
    """Whether layers are computed again in the backward pass (activation checkpointing)."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def recompute(model: Any) -> None:
    """Each layer is computed again in the backward pass. The method has another name since transformers 5.23, and the
    old one warns."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
