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


def expert_score(
    name: str,
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    widths: Widths,
    pruning_type: str,
    row: int,
    unit: int,
) -> float:
    """An expert, or a channel of one: tokens that have not chosen it count as zeros, for REAP not at all."""
    channels = pruning_type == "expert_ffn"
    layer, expert = (row // widths["experts"], row % widths["experts"]) if channels else (row, unit)
    key = f"model.layers.{layer}.mlp.experts.down_proj"
    weight, own = weights[key][expert].double(), inputs[f"{key}.{expert}"].double()
    if name == "reap" and not channels:
        return sum(float((weight @ token).norm()) for token in own) / max(1, len(own))
    tokens = len(inputs[f"model.layers.{layer}.mlp.gate.weight"])
    padded = torch.cat([own, own.new_zeros(tokens - len(own), own.shape[1])])
    total = 0.0
    for column in [unit] if channels else range(weight.shape[1]):
        if name == "reap":
            total += float(weight[:, column].norm() * own[:, column].abs().sum() / max(1, len(own)))
        elif name == "activation":
            total += float(padded[:, column].square().mean())
        else:
            total += column_score(name, weight, padded, column)
    return total**0.5 if name == "activation" else total


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
    queries, experts = widths.heads // widths.kv_heads, widths.counts().get("experts", 0)
    if pruning_type in ("expert", "expert_ffn"):
        return expert_score(name, weights, inputs, widths, pruning_type, row, unit)
    if pruning_type == "depth" and name != "activation":  # its heads and its FFN channels
        heads = [("attention", group) for group in range(widths.kv_heads)]
        ffn = [("expert", each) for each in range(experts)] or [("ffn", each) for each in range(widths.intermediate)]
        return sum(unit_score(name, weights, inputs, widths, head_dim, kind, unit, each) for kind, each in heads + ffn)
    if pruning_type == "depth":
        prefix = f"model.layers.{unit}."
        sites = [inputs[prefix + "self_attn.o_proj.weight"]]
        if not experts:
            sites.append(inputs[prefix + "mlp.down_proj.weight"])
        own = sum(float(x.double().square().mean(0).sum()) for x in sites)
        kind = "activation"
        more = (expert_score(kind, weights, inputs, widths, "expert", unit, each) for each in range(experts))
        return (own + sum(each**2 for each in more)) ** 0.5
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
    if experts:
        fused = ("mlp.gate", "mlp.experts.gate_up_proj")
        sites = tuple(fused if "mlp.gate_proj" in site else site for site in sites)
        weights = {key: each.flatten(0, -2) for key, each in weights.items()}
    ends = {"mlp.experts.gate_up_proj": ""}
    names = (
        (f"model.layers.{layer}.{part}{ends.get(part, '.weight')}" for part in site)
        for layer in layers
        for site in sites
    )
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
