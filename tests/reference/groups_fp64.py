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
            if name.endswith(("embed_tokens.weight", "lm_head.weight", "qkv_proj.weight", "gate_up_proj.weight")) or (
                name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"))
            ):
                mask[:, unit] = True
            elif name.endswith(("mlp.gate.weight", "experts.gate_up_proj")):
                mask[..., unit] = True
            elif name.endswith("experts.down_proj"):
                mask[:, unit, :] = True
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                mask[unit, :] = True
            elif name.endswith(("layernorm.weight", "model.norm.weight", "o_proj.bias", "down_proj.bias")):
                mask[unit] = True
        return masks
    layer = row // {"attention_query": widths.kv_heads, "expert_ffn": widths.counts().get("experts")}.get(
        pruning_type, 1
    )
    prefix = f"model.layers.{layer}."
    if pruning_type == "expert":
        for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            masks[prefix + name][unit] = True
        return masks
    if pruning_type == "expert_ffn":
        expert = row % widths["experts"]
        masks[prefix + "mlp.experts.gate_up_proj"][expert, unit] = True
        masks[prefix + "mlp.experts.gate_up_proj"][expert, widths["expert_intermediate"] + unit] = True
        masks[prefix + "mlp.experts.down_proj"][expert, :, unit] = True
        return masks
    heads_first = {"q": 0, "k": widths.heads * head_dim, "v": (widths.heads + widths.kv_heads) * head_dim}

    def fall(part: str, channel: int) -> None:
        """One output of a projection, fused or not: its row, its bias, its gain where a norm runs over all heads."""
        fused = part in "qkv" and prefix + "self_attn.qkv_proj.weight" in masks
        room = "self_attn" if part in "qkv" else "mlp"
        module = "self_attn.qkv_proj" if fused else f"{room}.{part}_proj"
        if part in ("gate", "up") and prefix + "mlp.gate_up_proj.weight" in masks:
            module, channel = "mlp.gate_up_proj", channel + (part == "up") * widths.intermediate
        place = channel + (heads_first[part] if fused else 0)
        masks[f"{prefix}{module}.weight"][place, :] = True
        if f"{prefix}{module}.bias" in masks:
            masks[f"{prefix}{module}.bias"][place] = True
        gain = masks.get(f"{prefix}self_attn.{part}_norm.weight")
        if gain is not None and len(gain) > head_dim:
            gain[place] = True

    if pruning_type == "ffn":
        fall("gate", unit)
        fall("up", unit)
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
            fall("q", channel)
            masks[prefix + "self_attn.o_proj.weight"][:, channel] = True
    for channel in key_rows:
        fall("k", channel)
        fall("v", channel)
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
