"""AdamW and the learning rate as a pure function of the position in the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig

EPS = 1e-8  # Adam's own


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) without decay on vectors: norm gains and biases."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=EPS, fused=True)


def check_trains(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises ValueError for an optimizer of other weights: the moments of what falls would be looked for there in vain,
    and bring it back to life."""
    own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if not any(id(weight) in own for weight in model.parameters()):
        raise ValueError(
            "the optimizer has none of the model's weights; build it on model.parameters() as they are now"
        )


def shaped_moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> Mapping[str, Tensor]:
    """Optimizer state tensors that have the weight's shape, by key; empty before its first update."""
    state: Mapping[str, Any] = optimizer.state.get(weight, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == weight.shape}


def load_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Puts optimizer state {name: {key: tensor}} in place, uncopied where it lies on the right device already."""
    fused = bool(optimizer.defaults.get("fused"))  # only then AdamW's step count lies beside the weight
    for name, weight in model.named_parameters():
        if moments.get(name):
            optimizer.state[weight] = {
                key: value.detach().to(weight.device if value.ndim or fused else value.device)
                for key, value in moments[name].items()
            }


def optimizer_like(
    old: torch.optim.Optimizer, model: nn.Module, heirs: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """One of the same kind and hyperparameters, which travel in its groups, without state. heirs: the weight that takes
    the place of each of the model's, by its name there; those without one have fallen. Heirs are trained where their
    forebears were."""
    places = {}
    for name, weight in model.named_parameters():
        if name in heirs:
            places[weight] = heirs[name].requires_grad_(weight.requires_grad)
    groups = [
        {**group, "params": [places[weight] for weight in group["params"] if weight in places]}
        for group in old.param_groups
    ]
    kind: Any = type(old)
    fresh: torch.optim.Optimizer = kind(groups)
    return fresh


def learning_rate(tokens: float, train: TrainConfig) -> float:
    """Learning rate for the step that begins after `tokens` tokens.

    Linear warm-up from 1 / (warmup + 1) of the peak at the first token: where there is one, the first step hardly moves
    a weight. Then "wsd": constant until the last `decay` of the run, which falls linearly to
    min_lr * lr (arXiv 2404.06395); "cosine": half a cosine from the end of warm-up to min_lr * lr
    (arXiv 1608.03983); "constant".
    """
    warmup = train.warmup.tokens(train.tokens)
    warm = min(1.0, (tokens + 1) / (warmup + 1))
    if train.schedule == "cosine":
        x = min(1.0, max(0.0, tokens - warmup) / max(1, train.tokens - warmup))
        share = 0.5 * (1.0 + math.cos(math.pi * x))
    elif train.schedule == "wsd":
        decay = train.decay.tokens(train.tokens)
        share = min(1.0, max(0.0, (train.tokens - tokens) / decay)) if decay else 1.0
    else:
        share = 1.0
    return train.lr * warm * (train.min_lr + (1.0 - train.min_lr) * share)
