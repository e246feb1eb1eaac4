"""The groups of docs/method.md, written out by hand for Llama-like models: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from efficientllm.pruning.widths import Widths


def group_masks(
    shapes: dict[str, tuple[int, ...]], widths: Widths, head_dim: int, pruning_type: str, row: int, unit: int
) -> dict[str, Tensor]:
    """{weight name: bool mask of what falls with one unit}. Stem and depth rows are 0; see groups.py for the others."""
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    if pruning_type == "depth":
        return {name: mask | (f"layers.{unit}." in name) for name, mask in masks.items()}
    if pruning_type == "stem":
        for name, mask in masks.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")) or name.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
            ):
                mask[:, unit] = True
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                mask[unit, :] = True
            elif name.endswith(("layernorm.weight", "model.norm.weight")):
                mask[unit] = True
        return masks
    layer = row if pruning_type != "attention_query" else row // widths.kv_heads
    prefix = f"model.layers.{layer}."
    if pruning_type == "ffn":
        masks[prefix + "mlp.gate_proj.weight"][unit, :] = True
        masks[prefix + "mlp.up_proj.weight"][unit, :] = True
        masks[prefix + "mlp.down_proj.weight"][:, unit] = True
        return masks
    queries = widths.heads // widths.kv_heads
    if pruning_type == "attention":
        heads = [unit * queries + index for index in range(queries)]
        key_rows = range(unit * head_dim, (unit + 1) * head_dim)
    else:
        heads = [(row % widths.kv_heads) * queries + unit]
        key_rows = range(0)
    for head in heads:
        for channel in range(head * head_dim, (head + 1) * head_dim):
            masks[prefix + "self_attn.q_proj.weight"][channel, :] = True
            masks[prefix + "self_attn.o_proj.weight"][:, channel] = True
            if prefix + "self_attn.q_proj.bias" in masks:
                masks[prefix + "self_attn.q_proj.bias"][channel] = True
    for channel in key_rows:
        for name in ("k_proj", "v_proj"):
            masks[prefix + f"self_attn.{name}.weight"][channel, :] = True
            if prefix + f"self_attn.{name}.bias" in masks:
                masks[prefix + f"self_attn.{name}.bias"][channel] = True
    return masks


def unit_saliency(name: str, masks: dict[str, Tensor], weights: dict[str, Tensor], grads: dict[str, Tensor]) -> float:
    """One unit's saliency in fp64, formula by formula as in docs/method.md."""
    total = 0.0
    for key, mask in masks.items():
        w, g = (table[key].double()[mask] for table in (weights, grads))
        total += {
            "taylor-vector": (g * w).sum(),
            "taylor-element": (g * w).abs().sum(),
            "fisher": ((g * w) ** 2).sum(),
            "magnitude": (w * w).sum(),
        }[name].item()
    return abs(total) if name == "taylor-vector" else total
