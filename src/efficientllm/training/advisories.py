"""What a run says before it starts: things to know about its plan that are no mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from efficientllm.config import PruneConfig, Recipe, WidthTarget
from efficientllm.models.latency_table import load_table
from efficientllm.models.rotation import obstacle
from efficientllm.models.space import rope_kind, rope_of
from efficientllm.pruning.decision import ByShape, Course, Standing
from efficientllm.pruning.feasible import amount
from efficientllm.pruning.groups import MULTIPLE
from efficientllm.pruning.schedule import EverySchedule, SpanSchedule
from efficientllm.training.planning import compared_by_scale
from efficientllm.training.state import PruningPlan
from efficientllm.training.targets import idle_floors, types_asked


def advisories_of(recipe: Recipe, plan: PruningPlan | None) -> tuple[str, ...]:
    """One line each; none where nothing is pruned."""
    if recipe.prune is None or plan is None:
        return ()
    prune = recipe.prune
    said = (
        _latency(prune),
        _types(prune, plan),
        _floors(prune, plan),
        _source(plan),
        _rotation(prune, plan),
        compared_by_scale(prune, plan.options),
        _shapes(prune, plan),
        _pace(recipe, plan),
    )
    return tuple(line for each in said for line in each)


def _rotation(prune: PruneConfig, plan: PruningPlan) -> Iterator[str]:
    """A stem that was to be turned, and cannot be."""
    reason = obstacle(plan.source) if prune.rotate == "auto" else None
    if reason:
        yield f"prune.rotate auto: the source is pruned as it stands, since {reason}"


def _latency(prune: PruneConfig) -> Iterator[str]:
    if prune.cost == "latency" and prune.latency_table:
        yield load_table(prune.latency_table).about(prune.latency_table)


def _types(prune: PruneConfig, plan: PruningPlan) -> Iterator[str]:
    """Types of the recipe that the cost does not count, and so keep the source's width."""
    source = plan.feasible.space.widths
    asked = types_asked(prune, plan.feasible.space)
    out = [name for name in asked if name not in plan.options.types and source.count(name) > 1]
    if out:
        yield f"prune.cost {prune.cost} does not count {', '.join(out)}: the result keeps the source's width there"
    for why, names in groupby(plan.feasible.space.fixed.items(), key=lambda each: each[1]):
        yield f"{', '.join(name for name, _ in names)} cannot fall: {why}"


def _floors(prune: PruneConfig, plan: PruningPlan) -> Iterator[str]:
    """Floors of widths that keep the source's anyway."""
    source, falling = plan.feasible.space.widths, plan.options.types
    if isinstance(prune.target, WidthTarget):
        falling = tuple(name for name in falling if plan.feasible.least(name) < source.count(name))
    idle = idle_floors(prune, plan.feasible.space, falling)
    if idle:
        yield f"without effect, since nothing that may fall narrows these widths: {', '.join(idle)}; leave them out"


def _source(plan: PruningPlan) -> Iterator[str]:
    """What of the source's configuration the result keeps, or bounds its shapes by."""
    kind, rope = rope_kind(plan.source), rope_of(plan.source)
    if kind != "default":
        factor = f", factor {rope['factor']:g}" if "factor" in rope else ""
        yield f"the source's rotary positions are scaled ({kind}{factor}); the result keeps that"
    rule = plan.feasible.space.hidden_rule
    if rule is not None:
        bound = "a multiple of its heads" if rule == MULTIPLE else f"{rule} to {int(rule) + 1} times its heads"
        yield f"a {plan.source.model_type} model is saved only with a hidden size that is {bound}: others are not open"


def _shapes(prune: PruneConfig, plan: PruningPlan) -> Iterator[str]:
    """How much each milestone leaves to damage to choose; nothing where the recipe has chosen the shape."""
    if isinstance(prune.target, WidthTarget):
        return
    for feasible in plan.milestones:
        number, unit = len(feasible.sizes), feasible.cost.unit
        largest, smallest = amount(feasible.sizes[0].item()), amount(feasible.sizes[-1].item())
        choice = f"{number} shapes are feasible, of {smallest} to" if number > 1 else "one shape is feasible, of"
        yield f"at {amount(feasible.target)} {unit}: {choice} {largest} {unit}"


def _pace(recipe: Recipe, plan: PruningPlan) -> Iterator[str]:
    """The paper's cadence sets no end: said where the run has no room for the events that its target takes. How many
    these are depends on the types that saliency will choose; counted is the way to a balanced shape."""
    if not isinstance(plan.schedule, EverySchedule):
        return
    at_once, guide = Course(plan.milestones, SpanSchedule(0.0, 0.0, 0.0, 0.0)), ByShape(plan.options.types)
    at = Standing(plan.feasible.space.widths)
    while not at_once.finished(at):
        at = at_once.bundle(at, 0.0, guide, bound=1.0)[-1].after
    assert recipe.prune is not None
    room = int((recipe.train.tokens - plan.begins) // plan.schedule.every)
    if room < at.events:
        yield (
            f"prune.every {recipe.prune.every} leaves room for {room:,} events, of about {at.events:,} that the target "
            "takes: the run would end above its target; lower prune.every, or raise train.tokens"
        )
