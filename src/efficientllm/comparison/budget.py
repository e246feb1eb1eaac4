"""Equal budgets: how many tokens an arm may train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BUDGETS = ("tokens", "flops", "pipeline")
CLOSE = 0.02  # of the budget: an arm that spent nearer to it than this has met it
TRIES = 3  # runs of an arm and seed towards a budget, beside the one at equal tokens


def solved_tokens(tried: Sequence[tuple[int, float]], tail: float, budget: float, batch: int) -> int:
    """Tokens, to the nearest whole batch, at which a straight line through the costs meets the budget; less than a
    batch where it lies above the budget from the start.

    tried: (tokens, FLOPs) of the runs so far. The line goes through the last two of them (the secant method), and with
    the first alone rises by `tail` FLOPs a token: refreshed scores and correction cost nearly as much in a short run as
    in a long one, so what pruning has cost stays and only the rest goes with the tokens.
    """
    tokens, flops = tried[-1]
    return round((tokens + (budget - flops) / _slope(tried, tail)) / batch) * batch


def _slope(tried: Sequence[tuple[int, float]], tail: float) -> float:
    if len(tried) < 2 or tried[-1][0] == tried[-2][0]:
        return tail
    (earlier, less), (later, more) = tried[-2:]
    # A token costs at least what one after pruning does. A flatter line means that the shorter run looked at the
    # gradient once more than the longer one, which says nothing of the cost of a token.
    return max(tail, (more - less) / (later - earlier))


def tail_cost(metrics: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs a token over the last tenth of a run, at least one step, all of a run of one step: of metrics.jsonl."""
    last = metrics[-1]
    first = {"flops": 0, "tokens": 0} if len(metrics) == 1 else metrics[-1 - max(1, len(metrics) // 10)]
    return float((last["flops"] - first["flops"]) / (last["tokens"] - first["tokens"]))


def close(spent: float, budget: float) -> bool:
    return abs(spent / budget - 1.0) <= CLOSE
