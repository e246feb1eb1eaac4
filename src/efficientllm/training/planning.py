"""How a recipe prunes its source: what falls, what is counted, where it lands and when. Every request is checked
against the source's config before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PretrainedConfig

from efficientllm.config import PruneConfig, Recipe, WidthTarget
from efficientllm.errors import UsageError
from efficientllm.models.experts import EXPERT_STEP, is_mixture
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.latency_table import load_table
from efficientllm.models.space import space_of
from efficientllm.pruning.correction import SolverOptions
from efficientllm.pruning.costs import ActiveParams, Cost, KVCache, Params, counts
from efficientllm.pruning.criteria import DEFAULT, Criterion, criteria_of
from efficientllm.pruning.dimensions import ATTENTION
from efficientllm.pruning.engine import PrunerOptions
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Space
from efficientllm.pruning.schedule import EverySchedule, Schedule, SpanSchedule
from efficientllm.training.state import PruningPlan
from efficientllm.training.targets import (
    alignment_of,
    floors_of,
    least_of,
    milestones_of,
    named_floors,
    target_of,
    types_asked,
)

COMPACT_AT = 0.04  # of the parameters: compactions then take 0.2 % of a run to 40 % (docs/results/overhead.md)
LOOK_BATCHES = {"one-shot": 8, "iterative": 1}  # to come, whose looks are averaged at rest; not studied


def pruning_plan(recipe: Recipe, source: PretrainedConfig) -> PruningPlan | None:
    """How a source model with this config is pruned; None where the recipe prunes nothing.

    Raises UsageError for a target that cannot be reached or a criterion that does not exist.
    """
    prune = recipe.prune
    if prune is None:
        return None
    space = space_of(source)
    try:
        options, milestones = decided(prune, source, recipe.data.sequence_length, seed=recipe.train.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return PruningPlan(
        source,
        milestones,
        schedule_of(recipe, prune, space, milestones[-1]),
        options,
        compact_at=COMPACT_AT,
        begins=recipe.pruning_starts,
        at_rest=prune.mode != "loop",
    )


def decided(
    prune: PruneConfig, source: PretrainedConfig, sequence_length: int, *, seed: int = 0
) -> tuple[PrunerOptions, tuple[FeasibleShapes, ...]]:
    """How the engine decides on this source, and where it lands. Raises UsageError or ValueError for what cannot be
    had."""
    _refuse_odd_experts(prune, source)
    cost = cost_of(prune, source, sequence_length)
    return options_and_milestones(prune, space_of(source), seed=seed, cost=cost)


def _refuse_odd_experts(prune: PruneConfig, source: PretrainedConfig) -> None:
    """Raises UsageError where a mixture of experts could end in widths in which torch's grouped products, by which
    plain transformers computes experts, cannot run it: they read rows of 16 bytes."""
    if not is_mixture(source):
        return
    asked = {"align": prune.align}
    if isinstance(prune.target, WidthTarget):
        asked |= {f"target.{name}": getattr(prune.target, name) for name in ("hidden", "intermediate")}
    for name, width in asked.items():
        if isinstance(width, int) and width % EXPERT_STEP:
            raise UsageError(
                f"prune.{name} {width} leaves experts that torch's grouped products cannot read, {EXPERT_STEP} numbers "
                f"at a time; choose a multiple of {EXPERT_STEP}"
            )


def options_and_milestones(
    prune: PruneConfig, space: Space, *, seed: int = 0, cost: Cost | None = None
) -> tuple[PrunerOptions, tuple[FeasibleShapes, ...]]:
    """How the engine decides, and where it may end: at the ladder's sizes, then at the target. cost: default Params.

    Raises ValueError for what cannot be had.
    """
    cost = cost or Params(space)
    types = types_of(prune, space, cost)
    criteria = criteria_of(prune.saliency, types)
    if prune.vocabulary and not all(each.nats for each in criteria.values()):
        raise ValueError(
            "prune.types has vocab, whose damage is in nats, but the other types' is not: leave prune.saliency at "
            f"{DEFAULT}"
        )
    if not isinstance(prune.target, WidthTarget):
        _refuse_several_scales(criteria)
    options = PrunerOptions(
        types=types,
        saliency=prune.saliency,
        bound=1.0 if prune.mode == "one-shot" else prune.bound,
        correction=None if prune.correction == "none" else SolverOptions(),
        order=prune.path or "saliency",
        look_batches=LOOK_BATCHES.get(prune.mode, 0),
        seed=seed,
    )
    targets = [*milestones_of(prune, space, cost), target_of(prune, space, cost)]
    floors = floors_of(prune, space, cost)
    milestones = [
        FeasibleShapes(
            space,
            target,
            types=options.types,
            align=alignment_of(prune, space.widths),
            floors=floors,
            cost=cost,
        )
        for target in targets
    ]
    for feasible, following in zip(milestones[-2::-1], milestones[:0:-1], strict=True):
        feasible.before(following)
    return options, tuple(milestones)


def _refuse_several_scales(criteria: Mapping[str, Criterion]) -> None:
    """Raises ValueError where the types' scores, by which the shape is chosen, are in several units."""
    scales = {"nats" if each.nats else each.name: f"{name} by {each.name}" for name, each in criteria.items()}
    if len(scales) > 1:
        raise ValueError(
            f"prune.saliency scores {' and '.join(scales.values())}, in units of their own, so that no shape can be "
            "chosen by them: name one criterion for all types, or give prune.target as widths"
        )


def compared_by_scale(prune: PruneConfig, options: PrunerOptions) -> Iterator[str]:
    """Says so where the shape is chosen by scores of several types that are not in nats."""
    names = {each.name for each in criteria_of(options.saliency, options.types).values() if not each.nats}
    if names and len(options.types) > 1 and not isinstance(prune.target, WidthTarget):
        yield (
            f"scores of {', '.join(names)} compare its types by scale only, as they are not in nats: {DEFAULT}, one "
            "type, or a target given as widths leaves nothing to compare"
        )


def cost_of(prune: PruneConfig, source: PretrainedConfig, sequence_length: int) -> Cost:
    """What the recipe counts. Raises UsageError for a latency table that is not there, or not of this source."""
    space = space_of(source)
    if prune.cost == "flops":
        return FlopsPerToken(space, sequence_length)
    if prune.cost == "active":
        return ActiveParams(space)
    if prune.cost == "kv-cache":
        return KVCache(space.head_dim)
    if prune.cost == "latency":
        if is_mixture(source):
            raise ValueError(
                "prune.cost latency has no table for mixtures of experts; choose flops or active in its place"
            )
        assert prune.latency_table is not None
        table = load_table(prune.latency_table)
        table.check(prune.latency_table, source)
        cost = table.cost()
        table.check_range(prune.latency_table, least_of(prune, space, named_floors(prune, space, cost)), space.widths)
        return cost
    return Params(space)


def types_of(prune: PruneConfig, space: Space, cost: Cost) -> tuple[str, ...]:
    """The types that may fall: of those in the recipe the ones that the cost counts (all of them where it is params).

    Raises ValueError where that leaves none, or where a target in widths narrows what the cost does not count: such
    events would have neither a price nor a pace.
    """
    types = types_asked(prune, space)
    if prune.cost == "params":
        return types
    source, least = space.widths, least_of(prune, space, floors_of(prune, space, cost))
    counted = tuple(name for name in types if counts(cost, source, name, least))
    free = [name for name in types if name not in counted and least.count(name) < source.count(name)]
    if isinstance(prune.target, WidthTarget):
        if free:
            raise ValueError(
                f"prune.target narrows what prune.cost {prune.cost} does not count ({', '.join(free)}): leave "
                "prune.cost out"
            )
        return types
    if not counted:
        raise ValueError(
            f"prune.types leaves nothing to fall that prune.cost {prune.cost} counts: add {ATTENTION}, or choose "
            "another cost"
        )
    return counted


def schedule_of(recipe: Recipe, prune: PruneConfig, space: Space, feasible: FeasibleShapes) -> Schedule:
    """When to prune, in tokens. With the weights at rest: all at once, where the loop's span begins."""
    train = recipe.train
    start = recipe.pruning_starts
    batch = train.batch_rows(recipe.data.sequence_length) * recipe.data.sequence_length
    source, target = feasible.cost(space.widths), feasible.target
    sizes = len(prune.ladder or ())  # each takes a step of its own
    if prune.mode != "loop":
        batches, needed = 1 + sizes + prune.vocabulary, "two batches" if prune.vocabulary else "a batch"
        _within(start + batches * batch, train.tokens, f"prune.mode {prune.mode} needs {needed} after prune.start")
        return SpanSchedule(start, start, source, target)
    if prune.every is not None:
        return EverySchedule(start, prune.every * batch)
    end = recipe.pruning_ends
    if sizes:
        _within(end + sizes * batch, train.tokens, f"prune.ladder needs {sizes} batches after prune.end")
    return SpanSchedule(start, end, source, target, prune.curve)


def _within(tokens: int, total: int, what: str) -> int:
    """`tokens`, once it lies within the run. Raises UsageError."""
    if tokens > total:
        raise UsageError(f"{what}, up to token {tokens:,}, but the run has {total:,}; raise train.tokens")
    return tokens
