"""From a recipe to a pruning plan: every request is checked against the source before anything is spent."""

from __future__ import annotations

import math
from itertools import pairwise

from transformers import PretrainedConfig

from efficientllm.config import PruneConfig, Recipe, WidthTarget
from efficientllm.errors import UsageError
from efficientllm.models.space import space_of, uneven_layers
from efficientllm.pruning.correction import SolverOptions
from efficientllm.pruning.criteria import criterion
from efficientllm.pruning.engine import PrunerOptions
from efficientllm.pruning.groups import DEPTH, Space, Widths
from efficientllm.pruning.landing import Alignment, Floors, Landing
from efficientllm.pruning.schedule import EverySchedule, Schedule, SpanSchedule
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
        options, landings = options_and_landings(prune, space, seed=recipe.train.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return PruningPlan(
        source,
        landings,
        schedule_of(recipe, prune, space, landings[-1]),
        options,
        compact_at=prune.compact_at,
        correction_tokens=prune.correction_tokens,
        calibrate_on_next=prune.calibration_batch == "next",
        lr_share=prune.lr if prune.mode == "loop" else 0.0,
        begins=prune.start.tokens(recipe.train.tokens),
    )


def refuse_uneven_depth(prune: PruneConfig, source: PretrainedConfig) -> None:
    """Raises UsageError where layers are to fall although they cannot take each other's places."""
    if DEPTH in prune.types and uneven_layers(source):
        raise UsageError(
            "prune.types has depth, but the source's layers attend differently (layer_types in its config.json); leave "
            "depth out"
        )


def options_and_landings(
    prune: PruneConfig, space: Space, *, seed: int = 0
) -> tuple[PrunerOptions, tuple[Landing, ...]]:
    """How the engine decides, and where it lands: on the ladder's rungs, then on the target.

    Raises ValueError for what cannot be had.
    """
    options = PrunerOptions(
        types=tuple(prune.types),
        saliency=prune.saliency,
        decay=prune.ema,
        calibrated=prune.selection == "calibrated",
        bound=1.0 if prune.mode == "one-shot" else prune.bound,
        correction=correction_of(prune),
        order=prune.order,
        gathers=prune.mode == "one-shot",
        seed=seed,
    )
    criterion(prune.saliency)
    targets = [*rungs_of(prune, space), target_of(prune, space)]
    landings = [
        Landing(
            space,
            target,
            types=options.types,
            align=alignment_of(prune, space.widths),
            floors=floors_of(prune, space),
        )
        for target in targets
    ]
    for landing, following in zip(landings[-2::-1], landings[:0:-1], strict=True):
        landing.before(following)
    return options, tuple(landings)


def rungs_of(prune: PruneConfig, space: Space) -> list[int]:
    """The ladder's sizes in parameters. Raises ValueError for one that is out of order."""
    sizes = [_parameters(size, space) for size in prune.ladder or ()]
    target = target_of(prune, space)
    for larger, smaller in pairwise([*sizes, *([target] if sizes and isinstance(target, int) else [])]):
        if smaller >= larger:
            raise ValueError(
                f"the ladder's sizes must fall towards the target, but {larger:,} comes before {smaller:,}; put the "
                "largest first"
            )
    return sizes


def _parameters(size: int | float, space: Space) -> int:
    return round(size * space.num_params()) if isinstance(size, float) else size


def correction_of(prune: PruneConfig) -> SolverOptions | None:
    if prune.correction == "none":
        return None
    return SolverOptions(prune.correction_damping, prune.correction_tolerance, prune.correction_iterations)


def target_of(prune: PruneConfig, space: Space) -> int | Widths:
    """A parameter count, or widths with those left out taken from the source."""
    target = prune.target
    if isinstance(target, WidthTarget):
        return _widths(target, space.widths)
    return _parameters(target, space)


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
    """When to prune, in tokens.

    Iterative: every batch takes `bound` of what is left, as the loop with its weights at rest; one-shot: all at once
    after the calibration batches.
    """
    train = recipe.train
    start = prune.start.tokens(train.tokens)
    batch = train.batch_rows(recipe.data.sequence_length) * recipe.data.sequence_length
    source, target = space.num_params(), landing.target
    if prune.mode == "one-shot":
        moment = start + prune.calibration_batches * batch
        _within(moment, train.tokens, f"prune.calibration_batches asks for {prune.calibration_batches} batches")
        return SpanSchedule(moment, moment, source, target)
    if prune.mode == "iterative":
        batches = math.ceil(math.log(source / target) / -math.log1p(-min(prune.bound, 0.99)))
        end = _within(start + batches * batch, train.tokens, f"prune.mode iterative needs {batches} batches")
        return SpanSchedule(start, end, source, target, "exponential")
    if prune.every is not None:
        return EverySchedule(start, prune.every * batch)
    end = prune.end.tokens(train.tokens)
    rungs = len(prune.ladder or ())
    if rungs:  # each takes a step of its own
        _within(end + rungs * batch, train.tokens, f"prune.ladder needs {rungs} batches after prune.end")
    return SpanSchedule(start, end, source, target, prune.curve)


def _within(tokens: int, total: int, what: str) -> int:
    """`tokens`, once it lies within the run. Raises UsageError."""
    if tokens > total:
        raise UsageError(f"{what}, up to token {tokens:,}, but the run has {total:,}; raise train.tokens")
    return tokens


def calibration_rows(recipe: Recipe, batch_rows: int) -> int:
    """Rows of the batch that measure a bundle's true cost: an eighth of it, 512 to 8,192 tokens, or as asked."""
    length = recipe.data.sequence_length
    tokens = recipe.prune.calibration_tokens if recipe.prune else None
    if tokens is None:
        tokens = min(max(batch_rows * length // 8, 512), 8192)
        return min(batch_rows, -(-tokens // length))
    return min(batch_rows, max(1, tokens // length))
