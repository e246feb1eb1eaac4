"""How often a run validates, and on how many rows: as its recipe says, or so that it stays a small part of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.pruning.groups import Space
from efficientllm.training.state import PruningPlan

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import Recipe

SHARE = 0.05  # of a run's FLOPs: the most that `auto` spends
MOST_TOKENS = 262_144
LEAST_ROWS = 8  # of the first and the last validation, whatever their share: fewer say nothing
USEFUL_TOKENS = 16_384  # between those two a run validates only where each time has as many tokens
TIMES = (20, 10, 5, 2, 1)  # in a run, the last at its end


@dataclass(frozen=True)
class ValidationPace:
    """every: tokens from one validation to the next; rows: of each; flops: of all, the source's included. said: what
    was chosen, in one line; None where the recipe chose both."""

    every: int
    rows: int
    flops: int
    said: str | None


def validation_pace(recipe: Recipe, space: Space, plan: PruningPlan | None) -> ValidationPace:
    """The pace of a run on a source of this space. Training counts as if all of it had the final shape, without looks
    and without a teacher, so what is chosen is at most SHARE of what the run spends."""
    run, length = recipe.run, recipe.data.sequence_length
    steps, batch_rows = recipe.train.steps(length), recipe.train.batch_rows(length)
    total = steps * batch_rows * length
    final = forward_flops(space, 1, length, plan.feasible.balanced() if plan else None)
    training = steps * batch_rows * training_flops(final)
    sizes = len(plan.milestones) - 1 if plan else 0  # each leaves a model that is validated

    def row_flops(times: int) -> int:
        """Of a row, for the source and so many times in the run."""
        return forward_flops(space, 1, length).total + (times + sizes) * final.total

    def affordable(times: int) -> int:
        return int(SHARE * training / row_flops(times))

    asked = None if run.validation_tokens == "auto" else max(1, run.validation_tokens // length)
    if run.validate_every == "auto":
        wanted = asked or -(-USEFUL_TOKENS // length)
        times = next((times for times in TIMES if affordable(times) >= wanted), 1)
        every = -(-total // times)
    else:
        every = run.validate_every.interval(total)
        times = -(-total // every)
    rows = asked or max(1, min(MOST_TOKENS // length, max(LEAST_ROWS, affordable(times))))
    flops = rows * row_flops(times)
    return ValidationPace(every, rows, flops, _said(recipe, rows, times, flops / training))


def _said(recipe: Recipe, rows: int, times: int, share: float) -> str | None:
    chosen = [f"run.{name}" for name in ("validation_tokens", "validate_every") if getattr(recipe.run, name) == "auto"]
    if not chosen:
        return None
    often = "once, at the end of the run" if times == 1 else f"{times} times in the run"
    return (
        f"validation: {rows:,} rows ({rows * recipe.data.sequence_length:,} tokens) of the source and {often}, at most "
        f"{share:.1%} of the run's FLOPs ({' and '.join(chosen)}: auto)"
    )
