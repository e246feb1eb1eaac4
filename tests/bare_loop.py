"""Somebody's own training loop, as short as it gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from efficientllm import Pruner

OPTIONS: dict[str, Any] = {"floors": {"intermediate": 8}, "align": 4, "bound": 0.05}


def batches(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 61, (4, 12), generator=generator) for _ in range(number)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: list[torch.Tensor]) -> None:
    for ids in steps:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
