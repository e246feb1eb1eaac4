"""Units removed one by one, and what each of them did to the loss.

What lies before the layer of a unit does not change when it falls, so its pass starts from the state there; a residual
channel is everywhere, and its pass starts with the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efficientllm.models.flops import forward_flops
from efficientllm.models.parts import blocks, body, final_norm, logits_of
from efficientllm.models.space import space_of
from efficientllm.pruning.dimensions import ATTENTION_QUERY, DEPTH, EXPERT_FFN, STEM
from efficientllm.pruning.groups import Removal, Space
from efficientllm.pruning.live import Live
from efficientllm.pruning.shards import local_place
from efficientllm.pruning.slices import group_slices
from efficientllm.training.chunked_loss import chunk_tokens, token_losses
from efficientllm.training.gradient import Precision, model_inputs, next_tokens, predicted_tokens

Unit = tuple[str, int, int]  # type, row, unit
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """One unit that was removed by itself, and what that did. increase: of the loss, in nats."""

    type: str
    row: int
    unit: int
    increase: float


def sample_units(space: Space, types: Sequence[str], count: int, seed: int) -> list[Unit]:
    """Up to `count` units of each type, drawn without repetition. Types of one unit are left out."""
    generator = torch.Generator().manual_seed(seed)
    live, chosen = Live.full(space.widths), []
    for pruning_type in space.types:
        rows, units = live.units(pruning_type).shape
        if pruning_type in types and units > 1:
            order = torch.randperm(rows * units, generator=generator)[:count].sort().values
            chosen += [(pruning_type, int(each) // units, int(each) % units) for each in order]
    return chosen


def first_layer(space: Space, unit: Unit) -> int | None:
    """The layer that a unit belongs to; None for the stem's, which belong to all and to the embedding."""
    pruning_type, row, number = unit
    if pruning_type == STEM:
        return None
    if pruning_type == DEPTH:
        return number
    if pruning_type == EXPERT_FFN:
        return row // space.widths["experts"]
    return row // space.widths.kv_heads if pruning_type == ATTENTION_QUERY else row


@contextmanager
def removed(space: Space, params: Mapping[str, Tensor], pruning_type: str, row: int, unit: int) -> Iterator[None]:
    """Zeroes one unit's group while the body runs, and puts every bit back."""
    rows = Live.full(space.widths).units(pruning_type).shape[0]
    units = torch.full((rows,), -1)
    units[row] = unit
    kept = []
    for part in group_slices(space, [Removal(pruning_type, units)]):
        weight = params[part.name].detach()
        place = local_place(weight, part.dim, part.indices, part.rows)
        kept.append((weight, place, weight[place]))
        weight[place] = 0.0
    try:
        yield
    finally:
        for weight, place, values in kept:
            weight[place] = values


def passes(space: Space, units: Sequence[Unit], length: int) -> float:
    """What `loss_increases` computes, in forward passes over the same rows."""
    forward, layers = forward_flops(space, 1, length), space.widths.layers
    starts = [first_layer(space, unit) or 0 for unit in units]
    return 1.0 + sum((forward.base * (layers - start) / layers + forward.head) / forward.total for start in starts)


@torch.no_grad()
def loss_increases(
    model: PreTrainedModel, units: Sequence[Unit], rows: Tensor, micro_batch: int, precision: Precision, tick: Tick
) -> list[Sample]:
    """The true loss increase of removing each unit, all on the same rows (rows, length).

    `tick` is told of every unit of every micro-batch.
    """
    space, params = space_of(model.config), dict(model.named_parameters())
    increases = [0.0] * len(units)
    for part in rows.split(micro_batch):
        run = _Pass(model, part, precision)
        for place, unit in enumerate(units):
            with removed(space, params, *unit):
                increases[place] += (run.loss(first_layer(space, unit)) - run.whole) / predicted_tokens(rows)
            tick(1)
    return [Sample(*unit, increase) for unit, increase in zip(units, increases, strict=True)]


class _Pass:
    """A forward pass over rows (rows, length) whose states before each layer are kept, to go on from any of them.

    whole: its summed loss in nats, in fp64.
    """

    def __init__(self, model: PreTrainedModel, rows: Tensor, precision: Precision) -> None:
        self._model, self._rows, self._precision = model, rows, precision
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # of each layer, its state first
        hooks = [
            block.register_forward_pre_hook(
                lambda module, args, kwargs: self._calls.append((args, kwargs)), with_kwargs=True
            )
            for block in blocks(model)
        ]
        try:
            self.whole = self.loss(None)
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, start: int | None) -> float:
        """The summed loss with the weights as they are now, from a layer on; None: from the embedding on."""
        with self._precision.context():
            hidden = self._from_embedding() if start is None else self._from_layer(start)
        weight, rule = self._model.get_output_embeddings().weight, logits_of(self._model)
        hidden, labels = hidden.flatten(0, 1) / rule.divisor, next_tokens(self._rows).flatten()
        losses = token_losses(hidden, weight, labels, chunk_tokens(len(weight)), rule.cap)
        return float(losses.double().sum())

    def _from_embedding(self) -> Tensor:
        hidden: Tensor = body(self._model)(**model_inputs(self._rows)).last_hidden_state
        return hidden

    def _from_layer(self, start: int) -> Tensor:
        state: Tensor = self._calls[start][0][0]
        layers = list(blocks(self._model))
        for layer, ((_, *others), kwargs) in zip(layers[start:], self._calls[start:], strict=True):
            state = layer(state, *others, **kwargs)
        normed: Tensor = final_norm(self._model)(state)
        return normed
