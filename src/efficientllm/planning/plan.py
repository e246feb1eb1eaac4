"""A recipe's cost in parameters, events, FLOPs, memory, hours and disk, from the source's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from transformers import PretrainedConfig

from efficientllm.config import PruneConfig, Recipe, WidthTarget, effective_recipe
from efficientllm.errors import UsageError
from efficientllm.models.flops import forward_flops, teacher_flops, training_flops
from efficientllm.models.space import space_of
from efficientllm.planning.memory import StepMemory, step_memory
from efficientllm.planning.simulation import Simulated, Simulation, StepFlops
from efficientllm.pruning.criteria import criteria_of
from efficientllm.pruning.decision import Standing
from efficientllm.pruning.groups import Space
from efficientllm.pruning.ledger import Ledger
from efficientllm.pruning.shapes import proportional_widths
from efficientllm.pruning.widths import Widths
from efficientllm.sizes import format_amount
from efficientllm.training.passes import captured_inputs_of, kept_every, rows_by_use
from efficientllm.training.run_plan import RunPlan, run_plan
from efficientllm.training.state import PruningPlan
from efficientllm.training.vocabulary import asking_flops, expected

DRAW_BYTES = 6  # an entry of the vocabulary and its log-probability (training/teacher_cache.py)


@dataclass(frozen=True)
class Estimate:
    """target: parameters at most; where prune.cost counts something else, those of `proportional`, and `reaches` is the
    target in that cost, else "". proportional: the result's widths in the source's proportions (in another cost: the
    final shape that comes nearest to them); saliency will choose others of the same size. phases: tokens before, while
    and after pruning. refreshes: gradients taken anew for another bundle of a step. flops: of the whole run;
    flops_by_part: the same as in a run's summary; pruning_flops: those of looks and correction;
    validation_flops come on top. flops_by_mode: of the recipe in each prune.mode that it can have, at the same tokens.
    suits: the mode to take, by what has been compared; "" for a shape that is given, or where it cannot be had.
    checkpoint, corpus, draws: bytes; checkpoints: that lie on the disk while one more is written; draws: of a teacher,
    kept. notes: the run's advisories."""

    parameters: int
    target: int
    reaches: str
    widths: Widths
    proportional: Widths
    events: int
    compactions: int
    refreshes: int
    phases: tuple[int, int, int]
    steps: int
    batch_tokens: int
    flops: float
    flops_by_part: Ledger
    pruning_flops: float
    flops_by_mode: dict[str, float]
    suits: str
    validation_flops: int
    step_flops: int
    memory: StepMemory
    checkpoint: int
    checkpoints: int
    corpus: int
    draws: int
    notes: tuple[str, ...] = ()


def estimate_of(plan: RunPlan, *, bf16: bool, gpu: bool = False, teacher: PretrainedConfig | None = None) -> Estimate:
    """bf16, gpu: how and on what it will be trained. teacher: another than the source."""
    recipe, config, space = plan.recipe, plan.source, plan.space
    forecast, counted = _forecast(plan)
    target, shape, reaches = _goal(forecast.space, forecast.pruning)
    teaching = space if teacher is None else space_of(teacher)
    done = _simulated(plan, forecast, teaching)
    modes = {} if recipe.prune is None else _flops_by_mode(plan, done.flops.total, teaching)
    parameters = int(space.num_params())
    return Estimate(
        parameters,
        target,
        reaches,
        space.widths,
        shape,
        done.at.events,
        done.compactions,
        done.refreshes,
        _phases(plan, done.at.events),
        plan.steps,
        plan.batch_tokens,
        done.flops.total,
        done.flops,
        done.pruning,
        modes,
        "loop" if "loop" in modes and not isinstance(recipe.prune and recipe.prune.target, WidthTarget) else "",
        plan.pace.flops,
        int(_step_flops(plan, teaching)(space.widths).total),
        replace(
            step_memory(config, recipe.train, plan.length, bf16=bf16, gpu=gpu, gates="gates" in _needs(plan)),
            teacher=_teacher_bytes(recipe, teaching, bf16=bf16),
            inputs=_input_bytes(plan, bf16=bf16),
        ),
        checkpoint=12 * parameters,
        checkpoints=recipe.run.keep + 1,
        corpus=(2 if config.vocab_size <= 2**16 else 4) * recipe.train.tokens,
        draws=DRAW_BYTES * (recipe.distill.samples or 0) * recipe.train.tokens if recipe.distill else 0,
        notes=(*plan.advisories, *counted),
    )


def _forecast(plan: RunPlan) -> tuple[RunPlan, list[str]]:
    """The plan with as many tokens as are expected to stay where they may fall, and what is to be said of that."""
    if plan.recipe.prune is None or not plan.recipe.prune.vocabulary:
        return plan, []
    found, rows = expected(plan)
    left = f"{rows:,} of {plan.source.vocab_size:,} tokens"
    return found, [f"counted are {left} from the first step on: how many fall, the text says"]


def _flops_by_mode(plan: RunPlan, own: float, teaching: Space) -> dict[str, float]:
    """own: of the mode that the recipe has."""
    content = plan.recipe.model_dump(mode="json")
    found = {}
    for mode in get_args(PruneConfig.model_fields["mode"].annotation):
        if mode == content["prune"]["mode"]:
            found[mode] = own
            continue
        try:
            recipe = effective_recipe(content | {"prune": content["prune"] | {"mode": mode}})
            other = run_plan(recipe, plan.source)
        except UsageError:  # such as a prune.start that suits the other modes alone
            continue
        found[mode] = run_flops(other, teaching).total
    return found


def _goal(space: Space, plan: PruningPlan | None) -> tuple[int, Widths, str]:
    """(parameters, widths, target in another cost) of the result."""
    if plan is None:
        return int(space.num_params()), space.widths, ""
    feasible = plan.feasible
    if feasible.cost.name == "params":
        target = int(feasible.target)
        try:
            return target, proportional_widths(space, target), ""
        except ValueError:  # with all layers; where those may fall too, the run still finds a shape
            return target, feasible.balanced(), ""
    shape = feasible.balanced()
    return int(space.num_params(shape)), shape, format_amount(feasible.target, feasible.cost.unit)


def _phases(plan: RunPlan, events: int) -> tuple[int, int, int]:
    total, recipe = plan.tokens, plan.recipe
    if recipe.prune is None or plan.pruning is None:
        return total, 0, 0
    start = plan.pruning.begins
    span = getattr(plan.pruning.schedule, "end", None)
    end = span if span is not None else start + events * (recipe.prune.every or 1) * plan.batch_tokens
    end = int(min(total, end))
    return start, end - start, total - end


def _needs(plan: RunPlan) -> set[str]:
    """What the criteria of a run look at."""
    if plan.pruning is None:
        return set()
    options = plan.pruning.options
    return {each.needs for each in criteria_of(options.saliency, options.types).values()}


def _teacher_bytes(recipe: Recipe, teacher: Space, *, bf16: bool) -> int:
    """A live teacher stands whole on every device, and its residual stream where it is compared; one whose draws lie on
    disk is loaded only to fill the cache."""
    if recipe.distill is None:
        return 0
    numbers, length = int(teacher.num_params()), recipe.data.sequence_length
    if recipe.distill.hidden:
        rows = min(recipe.train.micro_batch, recipe.train.batch_rows(length))
        numbers += rows * length * teacher.widths.layers * teacher.widths.hidden
    return numbers * (2 if bf16 else 4)


def _input_bytes(plan: RunPlan, *, bf16: bool) -> int:
    """Of the rows whose inputs a step with events keeps (training/hooks.py), in a single process."""
    if plan.pruning is None or (plan.pruning.options.correction is None and "inputs" not in _needs(plan)):
        return 0
    wanted = rows_by_use(plan.pruning, plan.batch_rows, plan.length)["inputs"]
    rows = -(-plan.batch_rows // kept_every(plan.batch_rows, wanted))
    return rows * plan.length * captured_inputs_of(plan.space) * (2 if bf16 else 4)


def _step_flops(plan: RunPlan, teaching: Space) -> StepFlops:
    """FLOPs of a step as a function of the allocated widths, a teacher's included."""
    recipe, space, batch_rows, length = plan.recipe, plan.space, plan.batch_rows, plan.length
    distill, asked = recipe.distill, forward_flops(teaching, batch_rows, length)
    teacher = teacher_flops(asked, keeps=distill.samples is not None) if distill else 0

    @lru_cache(1 << 16)
    def at(widths: Widths) -> Ledger:
        forward = forward_flops(space, batch_rows, length, widths)
        recomputes, chunked = recipe.train.gradient_checkpointing, distill is not None
        return Ledger(training_flops(forward, gradient_checkpointing=recomputes, chunked=chunked), teacher=teacher)

    return at


def run_flops(plan: RunPlan, teaching: Space) -> Ledger:
    """FLOPs of a whole run, as they will stand in its summary. teaching: the teacher's shape, where there is one."""
    forecast, _ = _forecast(plan)
    return _simulated(plan, forecast, teaching).flops


def _simulated(plan: RunPlan, forecast: RunPlan, teaching: Space) -> Simulated:
    cost = _step_flops(forecast, teaching)
    if forecast.pruning is None:
        done = Simulated(Standing(plan.space.widths), plan.space.widths)
        for _ in range(plan.steps):
            done.flops.add(cost(plan.space.widths))
        return done
    done = Simulation(forecast, cost).run()
    done.flops.looks += forward_flops(plan.space, plan.turned_by, plan.length).base
    done.flops.looks += asking_flops(forecast) if plan.recipe.prune and plan.recipe.prune.vocabulary else 0.0
    return done
