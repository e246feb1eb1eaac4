"""Validation loss: the mean next-token loss over held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from efficientllm.data.sampling import RowSource
from efficientllm.distributed.layout import Runner
from efficientllm.distributed.ranks import ALONE, World
from efficientllm.training.gradient import Forward, Precision, mean_loss, summed_loss


def spread(length: int, count: int) -> list[int]:
    """`count` indices spread evenly over range(length), all of them if it is shorter."""
    count = min(length, count)
    return [index * length // count for index in range(count)]


def chosen_rows(corpora: Sequence[RowSource], limit: int | None) -> list[list[int]]:
    """Rows of each corpus to validate on: all, or about `limit` in all, shared out by length and spread evenly."""
    total = sum(len(corpus) for corpus in corpora)
    if limit is None or limit >= total:
        return [list(range(len(corpus))) for corpus in corpora]
    return [spread(len(corpus), max(1, round(limit * len(corpus) / total))) for corpus in corpora]


def validation_loss(
    model: Forward,
    corpora: Sequence[RowSource],
    *,
    micro_batch: int,
    limit: int | None,
    device: torch.device | str,
    precision: Precision,
    runner: Runner = ALONE,
    ranks: World = ALONE,
    chunked: bool = False,
    tick: Callable[[int], None] = lambda rows: None,
) -> float:
    """Nats per predicted token over the chosen rows; `tick` is told of every micro-batch of rows done, by all processes
    together. With several processes each takes its share of every corpus. chunked: as for summed_loss."""

    def batches() -> Iterator[tuple[Tensor, bool]]:
        for corpus, indices in zip(corpora, chosen_rows(corpora, limit), strict=True):
            own = indices[ranks.share(len(indices))]
            rounds = ranks.rounds(len(indices), micro_batch)
            for first in range(0, rounds * micro_batch, micro_batch):
                part = own[first : first + micro_batch]
                yield corpus.take(part or indices[:1]).to(device), bool(part)
                tick(max(0, min(micro_batch * ranks.world, len(indices) - first * ranks.world)))

    return mean_loss(partial(summed_loss, model, precision=precision, chunked=chunked), batches(), runner, ranks)
