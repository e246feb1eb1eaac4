"""Know your saliency: scores by every criterion against the true loss increase of removing single units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA
from efficientllm.pruning.groups import PRUNING_TYPES, Cut, Live, Space
from efficientllm.pruning.saliency import drawn_scores, input_scores, reader_specs, unit_scores
from efficientllm.pruning.slices import group_slices
from efficientllm.training.capture import captured_inputs
from efficientllm.training.gradient import Precision, accumulate_gradient, mean_loss, summed_loss

Scores = dict[str, dict[str, Tensor]]  # criterion -> pruning type -> (rows, units)
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """One unit that was removed by itself, and what that did. increase: of the loss, in nats."""

    type: str
    row: int
    unit: int
    increase: float


def criteria_scores(
    model: PreTrainedModel, batches: Sequence[Tensor], micro_batch: int, precision: Precision, tick: Tick
) -> Scores:
    """Mean score over the batches of every unit by every criterion; F is the mean of g^2 over the batches.

    batches: int64 (rows, length) each. `tick` is told of every pass over a batch, three each.
    """
    space, params = space_of(model.config), dict(model.named_parameters())
    device = next(iter(params.values())).device
    readers = reader_specs(space)
    totals: Scores = {name: {} for name in CRITERIA}

    def add(name: str, scores: Mapping[str, Tensor]) -> None:
        for pruning_type, score in scores.items():
            old = totals[name].get(pruning_type, 0.0)
            totals[name][pruning_type] = old + score.cpu() / len(batches)

    fisher = {name: torch.zeros_like(weight) for name, weight in params.items()}
    for batch in batches:
        _gradient(model, batch, micro_batch, precision)
        for name, weight in params.items():
            if weight.grad is not None:
                fisher[name] += weight.grad.square() / len(batches)
        tick(1)
    for batch in batches:
        _gradient(model, batch, micro_batch, precision)
        for criterion in CRITERIA.values():
            if criterion.element:
                weights = (
                    (spec, params[spec.name].detach(), grad, fisher[spec.name])
                    for spec in space.params
                    if (grad := params[spec.name].grad) is not None
                )
                add(criterion.name, unit_scores(space, criterion, weights, device))
        tick(1)
        with torch.no_grad(), precision.context(), captured_inputs(model, [each.name for each in readers]) as inputs:
            for rows in batch.split(micro_batch):
                model(input_ids=rows, use_cache=False)
        for criterion in CRITERIA.values():
            if criterion.statistic:
                add(criterion.name, input_scores(space, criterion, readers, params, inputs, device))
        tick(1)
    model.zero_grad(set_to_none=True)
    totals["random"] = drawn_scores(space, seed=0)
    return totals


def _gradient(model: PreTrainedModel, batch: Tensor, micro_batch: int, precision: Precision) -> None:
    model.zero_grad(set_to_none=True)
    accumulate_gradient(lambda rows: summed_loss(model, rows, precision), batch, micro_batch)


def sample_units(space: Space, types: Sequence[str], count: int, seed: int) -> list[tuple[str, int, int]]:
    """Up to `count` units of each type, drawn without repetition: (type, row, unit). Types of one unit are left out."""
    generator = torch.Generator().manual_seed(seed)
    live, chosen = Live.full(space.widths), []
    for pruning_type in PRUNING_TYPES:
        rows, units = live.units(pruning_type).shape
        if pruning_type in types and units > 1:
            order = torch.randperm(rows * units, generator=generator)[:count].sort().values
            chosen += [(pruning_type, int(each) // units, int(each) % units) for each in order]
    return chosen


@contextmanager
def removed(space: Space, params: Mapping[str, Tensor], pruning_type: str, row: int, unit: int) -> Iterator[None]:
    """Zeroes one unit's group while the body runs, and puts every bit back."""
    rows = Live.full(space.widths).units(pruning_type).shape[0]
    units = torch.full((rows,), -1)
    units[row] = unit
    saved = []
    for part in group_slices(space, [Cut(pruning_type, units)]):
        weight, indices = params[part.name].detach(), part.indices.to(params[part.name].device)
        saved.append((weight, part.dim, indices, weight.index_select(part.dim, indices)))
    try:
        for weight, dim, indices, _ in saved:
            weight.index_fill_(dim, indices, 0.0)
        yield
    finally:
        for weight, dim, indices, values in saved:
            weight.index_copy_(dim, indices, values)


def loss_increases(
    model: PreTrainedModel,
    units: Sequence[tuple[str, int, int]],
    rows: Tensor,
    micro_batch: int,
    precision: Precision,
    tick: Tick,
) -> list[Sample]:
    """The true loss increase of removing each unit, all on the same rows (rows, length)."""
    space, params = space_of(model.config), dict(model.named_parameters())

    def loss() -> float:
        return mean_loss(model, rows.split(micro_batch), precision)

    whole, samples = loss(), []
    for pruning_type, row, unit in units:
        with removed(space, params, pruning_type, row, unit):
            samples.append(Sample(pruning_type, row, unit, loss() - whole))
        tick(1)
    return samples


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing their mean rank; nan without variation."""

    def ranks(values: Sequence[float]) -> Tensor:
        table = torch.tensor(values, dtype=torch.float64)
        below = (table[None, :] < table[:, None]).sum(1)
        return below + (table[None, :] == table[:, None]).sum(1) / 2

    a, b = ranks(one), ranks(other)
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else float("nan")


def judge(samples: Sequence[Sample], scores: Scores) -> dict[str, dict[str, dict[str, float]]]:
    """Per criterion and type (and "all"): rank correlation with the truth, and scale: the sum of scores over that of
    true increases, which is 1 for a score in nats that is right and should at least be alike for all types."""
    verdict: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_type in scores.items():
        verdict[name] = {}
        for group in [*dict.fromkeys(sample.type for sample in samples), "all"]:
            chosen = [sample for sample in samples if group in (sample.type, "all")]
            predicted = [float(by_type[sample.type][sample.row, sample.unit]) for sample in chosen]
            true = [sample.increase for sample in chosen]
            total = sum(true)
            verdict[name][group] = {
                "rank_correlation": rank_correlation(predicted, true),
                "scale": sum(predicted) / total if total > 0 else float("nan"),
                "units": len(chosen),
            }
    return verdict
