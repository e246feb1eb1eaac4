"""From a recipe to a pruning plan: every request is checked against the source before anything is spent."""

from __future__ import annotations

from itertools import pairwise

from transformers import PretrainedConfig

from efficientllm.config import CostTarget, PruneConfig, Recipe, WidthTarget
from efficientllm.errors import UsageError
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.latency_table import load_table
from efficientllm.models.space import space_of, uneven_layers
from efficientllm.pruning.correction import SolverOptions
from efficientllm.pruning.costs import Cost, KVCache, Params, counts
from efficientllm.pruning.criteria import criterion
from efficientllm.pruning.engine import PrunerOptions
from efficientllm.pruning.groups import ATTENTION, ATTENTION_QUERY, DEPTH, FFN_TYPE, STEM, Space, Widths
from efficientllm.pruning.landing import Alignment, Floors, Landing, amount
from efficientllm.pruning.schedule import EverySchedule, Schedule, SpanSchedule
from efficientllm.training.looks import LOOK_SHARE
from efficientllm.training.state import PruningPlan


def pruning_plan(recipe: Recipe, source: PretrainedConfig) -> PruningPlan | None:
    """The plan for a source model with this config; None where the recipe prunes nothing.

    Raises UsageError for a target that cannot be reached or a criterion that does not exist.
    """
    prune = recipe.prune
    if prune is None:
        return None
    space = space_of(source)
    refuse_uneven_depth(prune, source)
    try:
        cost = cost_of(prune, source, recipe.data.sequence_length)
        options, landings = options_and_landings(prune, space, seed=recipe.train.seed, cost=cost)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return PruningPlan(
        source,
        landings,
        schedule_of(recipe, prune, space, landings[-1]),
        options,
        compact_at=prune.compact_at,
        correction_tokens=prune.correction_tokens,
        calibration_tokens=prune.calibration_tokens,
        lr_share=prune.lr if prune.mode == "loop" else 1.0,
        begins=recipe.pruning_starts,
        at_rest=prune.mode != "loop",
    )


def refuse_uneven_depth(prune: PruneConfig, source: PretrainedConfig) -> None:
    """Raises UsageError where layers are to fall although they cannot take each other's places."""
    if DEPTH in prune.types and uneven_layers(source):
        raise UsageError(
            "prune.types has depth, but the source's layers attend differently (layer_types in its config.json); leave "
            "depth out"
        )


def options_and_landings(
    prune: PruneConfig, space: Space, *, seed: int = 0, cost: Cost | None = None
) -> tuple[PrunerOptions, tuple[Landing, ...]]:
    """How the engine decides, and where it lands: on the ladder's rungs, then on the target. cost: default Params.

    Raises ValueError for what cannot be had.
    """
    cost = cost or Params(space)
    options = PrunerOptions(
        types=types_of(prune, space, cost),
        saliency=prune.saliency,
        decay=prune.ema,
        calibrated=prune.selection == "calibrated",
        bound=1.0 if prune.mode == "one-shot" else prune.bound,
        correction=correction_of(prune),
        order=prune.order,
        gathers=_gathers(prune),
        seed=seed,
    )
    criterion(prune.saliency)
    targets = [*rungs_of(prune, space, cost), target_of(prune, space, cost)]
    landings = [
        Landing(
            space,
            target,
            types=options.types,
            align=alignment_of(prune, space.widths),
            floors=floors_of(prune, space),
            cost=cost,
        )
        for target in targets
    ]
    for landing, following in zip(landings[-2::-1], landings[:0:-1], strict=True):
        landing.before(following)
    return options, tuple(landings)


def _gathers(prune: PruneConfig) -> int:
    """Looks before the first event: with the weights at rest no step has taken any. Four are a batch."""
    if prune.mode == "loop":
        return 1
    return LOOK_SHARE * (prune.calibration_batches if prune.mode == "one-shot" else 1)


def cost_of(prune: PruneConfig, source: PretrainedConfig, sequence_length: int) -> Cost:
    """What the recipe counts. Raises UsageError for a latency table that is not there, or not of this source."""
    space = space_of(source)
    if prune.cost == "flops":
        return FlopsPerToken(space, sequence_length)
    if prune.cost == "kv-cache":
        return KVCache(space.head_dim)
    if prune.cost == "latency":
        assert prune.latency_table is not None
        table = load_table(prune.latency_table)
        table.check(prune.latency_table, source, prune.latency_on.device, prune.latency_on.dtype)
        table.check_range(prune.latency_table, _least(prune, space), space.widths)
        return table.cost()
    return Params(space)


def _least(prune: PruneConfig, space: Space) -> Widths:
    """The narrowest shape in which the recipe may look: its target's widths, else its floors."""
    if isinstance(prune.target, WidthTarget):
        return _widths(prune.target, space.widths)
    least, source = floors_of(prune, space), space.widths
    kv_heads = least.kv_heads if ATTENTION in prune.types else source.kv_heads
    queries = least.queries_per_kv if ATTENTION_QUERY in prune.types else source.queries_per_kv
    return Widths(
        least.layers if DEPTH in prune.types else source.layers,
        least.hidden if STEM in prune.types else source.hidden,
        kv_heads * queries,
        kv_heads,
        least.intermediate if FFN_TYPE in prune.types else source.intermediate,
    )


def types_of(prune: PruneConfig, space: Space, cost: Cost) -> tuple[str, ...]:
    """The types that may fall: of those in the recipe the ones that the cost counts (all of them where it is params).

    Raises ValueError where that leaves none, or where a target in widths narrows what the cost does not count: such
    events would have neither a price nor a pace.
    """
    types: tuple[str, ...] = tuple(prune.types)
    if prune.cost == "params":
        return types
    source, least = space.widths, _least(prune, space)
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


def rungs_of(prune: PruneConfig, space: Space, cost: Cost) -> list[float]:
    """The ladder's sizes in what the cost counts. Raises ValueError for one that is out of order."""
    sizes = [_size(size, space, cost) for size in prune.ladder or ()]
    target = target_of(prune, space, cost)
    for larger, smaller in pairwise([*sizes, *([] if not sizes or isinstance(target, Widths) else [target])]):
        if smaller >= larger:
            raise ValueError(
                f"the ladder's sizes must fall towards the target, but {amount(larger)} comes before "
                f"{amount(smaller)}; put the largest first"
            )
    return sizes


def _size(size: float | CostTarget, space: Space, cost: Cost) -> float:
    source: float = cost(space.widths)
    if isinstance(size, CostTarget):
        return size.amount.of(source)
    return round(size * source) if isinstance(size, float) else size


def correction_of(prune: PruneConfig) -> SolverOptions | None:
    if prune.correction == "none":
        return None
    return SolverOptions(prune.correction_damping, prune.correction_tolerance, prune.correction_iterations)


def target_of(prune: PruneConfig, space: Space, cost: Cost) -> float | Widths:
    """A size in what the cost counts, or widths with those left out taken from the source."""
    target = prune.target
    if isinstance(target, WidthTarget):
        return _widths(target, space.widths)
    return _size(target, space, cost)


def _widths(target: WidthTarget, source: Widths) -> Widths:
    kv_heads = target.kv_heads or source.kv_heads
    heads = target.heads or kv_heads * source.queries_per_kv
    if target.kv_heads is None and source.queries_per_kv == 1:
        kv_heads = heads
    if heads % kv_heads:
        raise ValueError(f"target heads {heads} is not a multiple of kv_heads {kv_heads}; choose a multiple")
    return Widths(
        target.layers or source.layers,
        target.hidden or source.hidden,
        heads,
        kv_heads,
        target.intermediate or source.intermediate,
    )


def alignment_of(prune: PruneConfig, widths: Widths) -> Alignment:
    if prune.align == "auto":
        return Alignment.automatic(widths)
    return Alignment(prune.align.hidden, prune.align.intermediate)


def floors_of(prune: PruneConfig, space: Space) -> Floors:
    floors = prune.floors
    return Floors(
        layers=min(floors.layers, space.widths.layers),
        hidden=min(floors.hidden or space.head_dim, space.widths.hidden),
        kv_heads=floors.kv_heads,
        queries_per_kv=floors.heads_per_kv,
        intermediate=min(floors.intermediate, space.widths.intermediate),
    )


def schedule_of(recipe: Recipe, prune: PruneConfig, space: Space, landing: Landing) -> Schedule:
    """When to prune, in tokens. With the weights at rest: all at once, where the loop's span begins."""
    train = recipe.train
    start = recipe.pruning_starts
    batch = train.batch_rows(recipe.data.sequence_length) * recipe.data.sequence_length
    source, target = landing.cost(space.widths), landing.target
    rungs = len(prune.ladder or ())  # each takes a step of its own
    if prune.mode != "loop":
        _within(start + (1 + rungs) * batch, train.tokens, f"prune.mode {prune.mode} needs a batch after prune.start")
        return SpanSchedule(start, start, source, target)
    if prune.every is not None:
        return EverySchedule(start, prune.every * batch)
    end = prune.end.tokens(train.tokens)
    if rungs:
        _within(end + rungs * batch, train.tokens, f"prune.ladder needs {rungs} batches after prune.end")
    return SpanSchedule(start, end, source, target, prune.curve)


def _within(tokens: int, total: int, what: str) -> int:
    """`tokens`, once it lies within the run. Raises UsageError."""
    if tokens > total:
        raise UsageError(f"{what}, up to token {tokens:,}, but the run has {total:,}; raise train.tokens")
    return tokens
