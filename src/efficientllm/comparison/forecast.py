"""What a comparison will cost, before anything is spent: runs, tokens, FLOPs."""

from __future__ import annotations

import math

from efficientllm.comparison.arms import Arm
from efficientllm.comparison.budget import TRIES
from efficientllm.comparison.rates import MORE
from efficientllm.comparison.work import Comparison
from efficientllm.models.flops import forward_flops, teacher_flops, training_flops
from efficientllm.pruning.costs import Cost
from efficientllm.pruning.widths import Widths
from efficientllm.sizes import format_count
from efficientllm.training.looks import LOOK_SHARE


def forecast(comparison: Comparison) -> str:
    """One sentence on what lies ahead. Runs that are finished already are counted too: they will only be read.

    Raises UsageError for a target that cannot be reached.
    """
    arms, tokens = comparison.arms, comparison.recipe.train.tokens
    each = len(comparison.grid) + len(comparison.seeds) - 1
    costs = expected_flops(comparison)
    said = (
        f"equal tokens: {len(arms) * each} runs of {format_count(tokens)} tokens ({len(comparison.grid)} rates and "
        f"{len(comparison.seeds) - 1} more seeds of {len(arms)} arms), {format_count(len(arms) * each * tokens)} in "
        f"all, and about {each * sum(costs.values()):.2g} FLOPs"
    )
    if len(comparison.grid) > 1:
        said += f"; up to {MORE} more runs of an arm whose best rate lies at the edge of those tried"
    for budget in comparison.budgets[1:]:
        others = [arm for arm in arms[1:] if budget == "flops" or arm.base == "scratch"]
        extra = comparison.source_flops() if budget == "pipeline" else 0
        flops = sum(costs["loop"] + (0 if arm.distilled else extra) for arm in others) * len(comparison.seeds)
        runs = len(others) * len(comparison.seeds)
        said += f"; budget {budget}: {runs} to {TRIES * runs} runs, about {flops:.2g} FLOPs for one of each"
    return said + "; finished runs are only read"


def expected_flops(comparison: Comparison) -> dict[str, float]:
    """FLOPs of each arm's run at equal tokens, estimated from shapes: training at the final size, and for arms that
    prune step by step a quarter of a batch looked at for every `bound` that falls, at a size midway."""
    pruning = comparison.plan.pruning
    assert pruning is not None
    pruned = pruning.landing.balanced()
    return {arm.name: _expected(comparison, arm, pruning.landing.cost, pruned) for arm in comparison.arms}


def _expected(comparison: Comparison, arm: Arm, cost: Cost, pruned: Widths) -> float:
    recipe, space, length = comparison.recipe, comparison.space, comparison.plan.length
    assert recipe.prune is not None
    final = space.widths if arm.base == "dense" else pruned

    def token(widths: Widths) -> float:
        own = training_flops(
            forward_flops(space, 1, length, widths),
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            chunked=arm.distilled,
        )
        return (own + (teacher_flops(forward_flops(space, 1, length)) if arm.distilled else 0)) / length

    flops = token(final) * recipe.train.tokens
    if arm.prunes and arm.base != "one-shot":
        share = cost(final) / cost(space.widths)
        looks = math.ceil(math.log(share) / math.log1p(-min(recipe.prune.bound, 0.99)))
        flops += looks * comparison.plan.batch_tokens / LOOK_SHARE * (token(final) + token(space.widths)) / 2
    return flops
