"""Criteria that look at inputs, column by column in fp64, and the columns that a unit feeds, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from efficientllm.pruning.widths import Widths

SITES = {
    "stem": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
        ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
    ),
    "ffn": (("mlp.down_proj",),),
    "heads": (("self_attn.o_proj",),),
}


def column_score(name: str, weight: Tensor, inputs: Tensor, column: int) -> float:
    """One column of one layer."""
    w, x = weight.double()[:, column], inputs.double()
    if name == "wanda":
        return float(sum(abs(value) for value in w.tolist()) * sum(v * v for v in x[:, column].tolist()) ** 0.5)
    if name == "flap":
        mean = float(x[:, column].sum()) / len(x)
        variance = sum((v - mean) ** 2 for v in x[:, column].tolist()) / (len(x) - 1)
        return float(variance * (w @ w))
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    return float(w @ w) / float(torch.linalg.inv(hessian)[column, column])


def unit_score(
    name: str,
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    widths: Widths,
    head_dim: int,
    pruning_type: str,
    row: int,
    unit: int,
) -> float:
    """A unit's score: the columns of every layer that reads it, summed."""
    queries = widths.heads // widths.kv_heads
    if pruning_type == "depth" and name != "activation":  # its heads and its FFN channels
        heads = [("attention", group) for group in range(widths.kv_heads)]
        parts = heads + [("ffn", channel) for channel in range(widths.intermediate)]
        return sum(unit_score(name, weights, inputs, widths, head_dim, kind, unit, each) for kind, each in parts)
    if pruning_type == "depth":
        sites = [inputs[f"model.layers.{unit}.{part}.weight"] for part in ("self_attn.o_proj", "mlp.down_proj")]
        return sum(float(x.double().square().mean(0).sum()) for x in sites) ** 0.5
    if pruning_type == "stem":
        layers, columns, sites = range(widths.layers), [unit], SITES["stem"]
    elif pruning_type == "ffn":
        layers, columns, sites = range(row, row + 1), [unit], SITES["ffn"]
    elif pruning_type == "attention":
        heads = range(unit * queries, (unit + 1) * queries)
        columns = [head * head_dim + channel for head in heads for channel in range(head_dim)]
        layers, sites = range(row, row + 1), SITES["heads"]
    else:
        head = (row % widths.kv_heads) * queries + unit
        columns = [head * head_dim + channel for channel in range(head_dim)]
        layers, sites = range(row // widths.kv_heads, row // widths.kv_heads + 1), SITES["heads"]
    names = ((f"model.layers.{layer}.{part}.weight" for part in site) for layer in layers for site in sites)
    places = [[name for name in site if name in weights] for site in names]
    if pruning_type == "stem" and "lm_head.weight" in weights:
        places.append(["lm_head.weight"])
    total = 0.0
    for site in places:
        for column in columns:
            if name == "activation":  # each input once, whoever reads it
                total += float(inputs[site[0]].double()[:, column].square().mean())
            else:
                total += sum(column_score(name, weights[part], inputs[part], column) for part in site)
    return total**0.5 if name == "activation" else total
