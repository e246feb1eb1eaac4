"""Validation loss: the mean next-token loss over held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from efficientllm.training.gradient import Forward, Precision, mean_loss


class Rows(Protocol):
    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Tensor: ...


def spread(length: int, count: int) -> list[int]:
    """`count` indices spread evenly over range(length), all of them if it is shorter."""
    count = min(length, count)
    return [index * length // count for index in range(count)]


def chosen_rows(corpora: Sequence[Rows], limit: int | None) -> list[list[int]]:
    """Rows of each corpus to validate on: all, or about `limit` in all, shared out by length and spread evenly."""
    total = sum(len(corpus) for corpus in corpora)
    if limit is None or limit >= total:
        return [list(range(len(corpus))) for corpus in corpora]
    return [spread(len(corpus), max(1, round(limit * len(corpus) / total))) for corpus in corpora]


def validation_loss(
    forward: Forward,
    corpora: Sequence[Rows],
    *,
    micro_batch: int,
    limit: int | None,
    device: torch.device | str,
    precision: Precision,
    tick: Callable[[int], None] = lambda rows: None,
) -> float:
    """Nats per predicted token over the chosen rows; `tick` is told of every micro-batch of rows done."""

    def batches() -> Iterator[Tensor]:
        for corpus, indices in zip(corpora, chosen_rows(corpora, limit), strict=True):
            for first in range(0, len(indices), micro_batch):
                rows = corpus.take(indices[first : first + micro_batch])
                yield rows.to(device)
                tick(len(rows))

    return mean_loss(forward, batches(), precision)
