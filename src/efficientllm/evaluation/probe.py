"""Know your saliency: scores by every criterion against the true loss increase of removing single units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from efficientllm.evaluation.removal import Sample, Tick
from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA
from efficientllm.pruning.dimensions import EXPERT_TYPES
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.readers import input_scores, reader_specs
from efficientllm.pruning.saliency import drawn_scores, unit_scores
from efficientllm.training.gradient import Precision, predicted_tokens, summed_loss
from efficientllm.training.hooks import Watch, captured_inputs, unwatched, watched_gates

Scores = dict[str, dict[str, Tensor]]  # criterion -> pruning type -> (rows, units)


def criteria_scores(
    model: PreTrainedModel, batches: Sequence[Tensor], micro_batch: int, precision: Precision, tick: Tick
) -> Scores:
    """Mean score over the batches of every unit by every criterion, from one forward and backward pass over each; those
    that score experts alone are for models that have some.

    batches: int64 (rows, length) each. `tick` is told of every batch.
    """
    space, params = space_of(model.config), dict(model.named_parameters())
    device = next(iter(params.values())).device
    readers = reader_specs(space)
    routed = not set(space.types).isdisjoint(EXPERT_TYPES)
    criteria = [each for each in CRITERIA.values() if routed or not each.routed]
    totals: Scores = {each.name: {} for each in criteria}

    def add(name: str, scores: Mapping[str, Tensor]) -> None:
        for pruning_type, score in scores.items():
            old = totals[name].get(pruning_type, 0.0)
            totals[name][pruning_type] = old + score.cpu() / len(batches)

    for batch in batches:
        gates = GateSums(space, device)
        with (
            captured_inputs(model, [each.name for each in readers]) as inputs,
            watched_gates(model, space, gates) as watch,
        ):
            gradient(model, batch, micro_batch, precision, watch, gates)
        for criterion in criteria:
            if criterion.needs == "gates":
                add(criterion.name, gates.scores())
            elif criterion.element:
                weights = (
                    (spec, params[spec.name].detach(), grad)
                    for spec in space.params
                    if (grad := params[spec.name].grad) is not None
                )
                add(criterion.name, unit_scores(space, criterion, weights, device))
            elif criterion.statistic:
                with torch.no_grad():
                    add(criterion.name, input_scores(space, criterion, readers, params, inputs, device))
        tick(1)
    model.zero_grad(set_to_none=True)
    totals["random"] = drawn_scores(space, seed=0)
    return totals


def gradient(
    model: PreTrainedModel,
    batch: Tensor,
    micro_batch: int,
    precision: Precision,
    watch: Watch = unwatched,
    gates: GateSums | None = None,
) -> None:
    """The gradient of the batch's mean loss, in .grad. watch: of the gates, entered around each forward pass."""
    model.zero_grad(set_to_none=True)
    for place, part in enumerate(batch.split(micro_batch)):
        if gates is not None:
            gates.counted = predicted_tokens(part)
        with watch(place * micro_batch):
            loss = summed_loss(model, part, precision)
        (loss / predicted_tokens(batch)).backward()


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; nan without variation."""
    varied = len(set(one)) > 1 and len(set(other)) > 1
    return float(spearmanr(one, other).statistic) if varied else float("nan")


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
