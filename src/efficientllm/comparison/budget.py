"""Equal budgets: how many tokens an arm may train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficientllm.config import Recipe
from efficientllm.errors import UsageError
from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.pruning.groups import Space

BUDGETS = ("tokens", "flops", "pipeline")
CLOSE = 0.01  # of the budget: nearer than this an arm is not run again


def batch_tokens(recipe: Recipe) -> int:
    length = recipe.data.sequence_length
    return recipe.train.batch_rows(length) * length


def tokens_for_flops(tokens: int, flops: float, budget: float, batch: int, *, tail: float | None = None) -> int:
    """Tokens, in whole batches, for which an arm that spent `flops` on `tokens` spends about `budget`.

    tail: FLOPs a token after pruning, for modes that prune at rest: their cost of pruning stays, the rest grows with
    the tokens, so this is exact. None: all of it is taken to grow with the tokens; exact where nothing is pruned, and
    up to the cost of the events themselves where pruning takes a share of the run. What a run then really spends is in
    the results. Raises UsageError where not one batch fits.
    """
    wanted = tokens * budget / flops if tail is None else tokens + (budget - flops) / tail
    if wanted < batch:
        raise UsageError(f"{budget:.3g} FLOPs do not pay for one batch of this arm: raise train.tokens")
    return int(wanted / batch + 1e-6) * batch


def tail_cost(metrics: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs a token over the last tenth of a run, at least one step: records of metrics.jsonl."""
    last = metrics[-1]
    first = metrics[max(0, len(metrics) - 1 - max(1, len(metrics) // 10))]
    return float((last["flops"] - first["flops"]) / (last["tokens"] - first["tokens"]))


def source_flops(recipe: Recipe, space: Space) -> int:
    """FLOPs of the source's own pretraining, at this recipe's sequence length. Raises UsageError where it is unsaid."""
    if recipe.source_tokens is None:
        raise UsageError(
            "--budget pipeline needs to know what the source's own pretraining cost: set source_tokens in the recipe "
            "to the tokens that it was trained on"
        )
    length = recipe.data.sequence_length
    return recipe.source_tokens * training_flops(forward_flops(space, 1, length)) // length


def close(spent: float, budget: float) -> bool:
    return abs(spent / budget - 1.0) <= CLOSE
