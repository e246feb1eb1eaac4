"""What a comparison will cost, before anything is spent: runs, tokens, FLOPs."""

from __future__ import annotations

from efficientllm.comparison.arms import Arm
from efficientllm.comparison.equal_flops import TRIES
from efficientllm.comparison.rates import MORE
from efficientllm.comparison.work import Comparison
from efficientllm.errors import UsageError
from efficientllm.models.space import narrowed_config
from efficientllm.planning.plan import run_flops
from efficientllm.sizes import format_count
from efficientllm.training.run_plan import run_plan


def forecast(comparison: Comparison) -> str:
    """One sentence on what lies ahead. Runs that are finished already are counted too: they will only be read.

    Raises UsageError for a target that cannot be reached.
    """
    arms, tokens = comparison.arms, comparison.recipe.train.tokens
    each = len(comparison.grid) + len(comparison.seeds) - 1
    costs = {}
    for arm in arms:
        try:
            costs[arm.name] = expected_flops(comparison, arm)
        except UsageError:
            if arm.name == "loop":
                raise
    unknown = [arm.name for arm in arms if arm.name not in costs]
    said = (
        f"equal tokens: {len(arms) * each} runs of {format_count(tokens)} tokens ({len(comparison.grid)} rates and "
        f"{len(comparison.seeds) - 1} more seeds of {len(arms)} arms), {format_count(len(arms) * each * tokens)} in "
        f"all, and about {each * sum(costs.values()):.2g} FLOPs"
        + (f" without {', '.join(unknown)}, which may have no recipe in the loop's shape" if unknown else "")
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


def expected_flops(comparison: Comparison, arm: Arm) -> float:
    """FLOPs of an arm's run at equal tokens, as `efficientllm plan` has them of its recipe. Where it waits for the
    loop's shape, the final shape nearest to the source's proportions stands for that."""
    plan, train = comparison.plan, comparison.recipe.train
    assert plan.pruning is not None
    pruned = plan.pruning.feasible.balanced()
    loop = {"result": {"widths": pruned.record(), "path": comparison.recipe.source}}
    recipe = comparison.arm_recipe(
        arm, seed=comparison.seeds[0], lr=train.lr, tokens=train.tokens, folder=comparison.folder, loop=loop
    )
    source = narrowed_config(plan.source, pruned) if arm.base == "scratch" else plan.source
    return run_flops(run_plan(recipe, source), plan.space).total
