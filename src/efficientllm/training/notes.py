"""What a run says before it starts: things to know about its plan that are no mistakes."""

from __future__ import annotations

from collections.abc import Iterator

from efficientllm.config import AlignConfig, PruneConfig, Recipe
from efficientllm.models.latency_table import load_table
from efficientllm.pruning.landing import amount
from efficientllm.training.planning import options_and_landings
from efficientllm.training.state import PruningPlan


def notes_of(recipe: Recipe, plan: PruningPlan | None) -> tuple[str, ...]:
    """One line each; none where nothing is pruned."""
    if recipe.prune is None or plan is None:
        return ()
    return (*_latency(recipe.prune), *_types(recipe.prune, plan), *_gaps(recipe.prune, plan))


def _latency(prune: PruneConfig) -> Iterator[str]:
    if prune.cost == "latency" and prune.latency_table:
        yield load_table(prune.latency_table).about(prune.latency_table)


def _types(prune: PruneConfig, plan: PruningPlan) -> Iterator[str]:
    """Types of the recipe that the cost does not count, and so keep the source's width."""
    source = plan.landing.space.widths
    out = [name for name in prune.types if name not in plan.options.types and source.count(name) > 1]
    if out:
        yield f"prune.cost {prune.cost} does not count {', '.join(out)}: the result keeps the source's width there"


def _gaps(prune: PruneConfig, plan: PruningPlan) -> Iterator[str]:
    """Landings further than 1 % under their target, and why."""
    if all(landing.gap <= landing.tolerance for landing in plan.landings):
        return
    space, cost = plan.landing.space, plan.landing.cost
    finest = prune.model_copy(update={"align": AlignConfig()})
    _, unaligned = options_and_landings(finest, space, cost=cost)
    for landing, finer in zip(plan.landings, unaligned, strict=True):
        if landing.gap <= landing.tolerance:
            continue
        size = f"{amount(landing.target)} {cost.unit}"
        why, mend = "no shape lies", ", since its units are larger steps"
        if finer.gap < landing.gap:
            why, mend = "alignment leaves no shape", " (a smaller prune.align comes closer)"
        yield f"{why} within 1 % of {size}; the run will land {landing.gap:.1%} under it{mend}"
