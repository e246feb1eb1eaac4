"""A model's parts by what they do: the same attributes in every family that is known here (adapter.py)."""

from __future__ import annotations

from typing import Any

from torch import nn

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"  # where it is not the embedding's


def body(model: Any) -> nn.Module:
    """All but the LM head: token ids in, last hidden states out."""
    part: nn.Module = model.model
    return part


def final_norm(model: Any) -> nn.Module:
    """What the last layer's state passes before the LM head."""
    part: nn.Module = model.model.norm
    return part


def blocks(model: Any) -> nn.ModuleList:
    """The decoder layers, in order."""
    parts: nn.ModuleList = model.model.layers
    return parts
