"""A recipe's cost in parameters, events, FLOPs, memory, hours and disk, from the source's configuration alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from efficientllm.config import Recipe
from efficientllm.models.flops import forward_flops, teacher_flops, training_flops
from efficientllm.models.space import space_of
from efficientllm.planning.memory import StepMemory, step_memory
from efficientllm.pruning.groups import PRUNING_TYPES, Space, Widths
from efficientllm.pruning.schedule import scheduled_size
from efficientllm.pruning.shapes import proportional_widths
from efficientllm.sizes import format_amount
from efficientllm.training.notes import notes_of
from efficientllm.training.planning import pruning_plan
from efficientllm.training.state import PruningPlan

CostOf = Callable[[float], float]
POINTS = 64  # at which the size over the pruning span is sampled


@dataclass(frozen=True)
class Plan:
    """target: parameters at most; where prune.cost counts something else, those of `proportional`, and `reaches` is the
    target in that cost, else "". proportional: the result's widths in the source's proportions (in another cost: the
    final shape that comes nearest to them); saliency will choose others of the same size. phases: tokens before, while
    and after pruning. flops: of the whole run. Bytes throughout. notes: what the run will say before it starts."""

    parameters: int
    target: int
    reaches: str
    widths: Widths
    proportional: Widths
    events: int
    compactions: int
    phases: tuple[int, int, int]
    steps: int
    batch_tokens: int
    flops: float
    step_flops: int
    memory: StepMemory
    checkpoint: int
    corpus: int
    notes: tuple[str, ...] = ()


def plan_of(
    recipe: Recipe,
    config: PretrainedConfig,
    *,
    bf16: bool,
    gpu: bool = False,
    teacher: PretrainedConfig | None = None,
) -> Plan:
    """bf16, gpu: how and on what it will be trained. teacher: another than the source.

    Raises UsageError for a recipe that could not be run on this source.
    """
    space, length = space_of(config), recipe.data.sequence_length
    plan = pruning_plan(recipe, config)
    batch_rows = recipe.train.batch_rows(length)
    batch, steps = batch_rows * length, recipe.train.steps(length)
    target, shape, reaches = _goal(space, plan)
    events = sum(space.widths.count(kind) - shape.count(kind) for kind in PRUNING_TYPES) if plan else 0
    phases = _phases(recipe, plan, batch, steps, events)
    teaching = space if teacher is None else space_of(teacher)
    cost = _costs(recipe, space, teaching, batch_rows, shape)
    parameters = int(space.num_params())
    sizes = _sizes(recipe, plan, parameters, target)
    pruning = sum(cost(size) for size in sizes) / len(sizes) * phases[1] / batch if sizes else 0.0
    flops = cost(parameters) * phases[0] / batch + pruning + cost(target) * phases[2] / batch
    flops += _refreshes(recipe, parameters, target, phases[1] // batch) * cost(parameters)
    compactions = (
        math.ceil(math.log(parameters / target) / -math.log1p(-recipe.prune.compact_at)) if recipe.prune else 0
    )
    return Plan(
        parameters,
        target,
        reaches,
        space.widths,
        shape,
        events,
        compactions,
        phases,
        steps,
        batch,
        flops,
        int(cost(parameters)),
        replace(
            step_memory(config, recipe.train, length, bf16=bf16, gpu=gpu),
            teacher=_teacher_bytes(recipe, teaching, bf16=bf16),
        ),
        checkpoint=12 * parameters,
        corpus=(2 if config.vocab_size <= 2**16 else 4) * recipe.train.tokens,
        notes=notes_of(recipe, plan),
    )


def _goal(space: Space, plan: PruningPlan | None) -> tuple[int, Widths, str]:
    """(parameters, widths, target in another cost) of the result."""
    if plan is None:
        return int(space.num_params()), space.widths, ""
    landing = plan.landing
    if landing.cost.name == "params":
        target = int(landing.target)
        return target, proportional_widths(space, target), ""
    shape = landing.balanced()
    return int(space.num_params(shape)), shape, format_amount(landing.target, landing.cost.unit)


def _phases(recipe: Recipe, plan: PruningPlan | None, batch: int, steps: int, events: int) -> tuple[int, int, int]:
    total = steps * batch
    if recipe.prune is None or plan is None:
        return total, 0, 0
    start = recipe.prune.start.tokens(recipe.train.tokens)
    span = getattr(plan.schedule, "end", None)
    end = span if span is not None else start + events * (recipe.prune.every or 1) * batch
    end = int(min(total, end))
    return start, end - start, total - end


def _teacher_bytes(recipe: Recipe, teacher: Space, *, bf16: bool) -> int:
    """A live teacher stands whole on every device; one whose logits lie on disk is loaded only to fill the cache."""
    return int(teacher.num_params()) * (2 if bf16 else 4) if recipe.distill else 0


def _costs(recipe: Recipe, space: Space, teaching: Space, batch_rows: int, shape: Widths) -> CostOf:
    """FLOPs of a step as a function of the parameters, linear between source and target. Calibration and
    correction are left out: they come with events, of which there are few beside steps in a run of this kind."""
    length, distill = recipe.data.sequence_length, recipe.distill is not None
    keeps = recipe.distill is not None and recipe.distill.top_k is not None
    options = {"gradient_checkpointing": recipe.train.gradient_checkpointing, "chunked": distill}

    def at(widths: Widths) -> float:
        own = training_flops(forward_flops(space, batch_rows, length, widths), **options)
        teacher = teacher_flops(forward_flops(teaching, batch_rows, length), keeps=keeps) if distill else 0
        return float(own + teacher)

    source, target = int(space.num_params()), int(space.num_params(shape))
    ends = at(space.widths), at(shape)
    slope = (ends[0] - ends[1]) / max(1, source - target)
    return lambda parameters: ends[1] + slope * (parameters - target)


def _sizes(recipe: Recipe, plan: PruningPlan | None, source: int, target: int) -> list[float]:
    if plan is None or recipe.prune is None:
        return []
    curve = getattr(plan.schedule, "curve", "linear")
    return [scheduled_size((point + 0.5) / POINTS, source, target, curve) for point in range(POINTS)]


def _refreshes(recipe: Recipe, source: int, target: int, batches: int) -> int:
    """Gradients taken anew because the schedule asks for more than `bound` in one step; each costs a step's FLOPs."""
    if recipe.prune is None or recipe.prune.mode != "loop":
        return 0
    looks = math.ceil(math.log(source / target) / -math.log1p(-min(recipe.prune.bound, 0.99)))
    return max(0, looks - batches)
