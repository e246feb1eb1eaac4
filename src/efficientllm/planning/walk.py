"""A run walked through step by step by the engine's own rules, without a model: what it will do, and what that costs.

Where damage would choose, the walk heads for the most balanced shape of each landing, and events take the way that
leaves them the same share of their path ("interleaved", pruning/selection.py): a run will go by other widths of the
same size, at about the same cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from efficientllm.models.flops import ForwardFlops, forward_flops
from efficientllm.models.parts import HEAD_WEIGHT
from efficientllm.pruning.correction import solve_flops
from efficientllm.pruning.criteria import criterion
from efficientllm.pruning.groups import ATTENTION, ATTENTION_QUERY, FFN_TYPE, PRUNING_TYPES, STEM, Space, Widths
from efficientllm.pruning.landing import landed, rung_after
from efficientllm.pruning.selection import most_left
from efficientllm.training.state import PruningPlan, narrower

StepFlops = Callable[[Widths], float]
ITERATIONS = 10  # of a correction's solve at the default tolerance: docs/results/plan.md


@dataclass
class Walk:
    """What a run has done so far. flops: of everything in it; pruning: those of calibration, scores and correction and
    of gradients taken anew."""

    live: Widths
    allocated: Widths
    goal: Widths
    events: int = 0
    compactions: int = 0
    refreshes: int = 0
    rung: int = 0
    uncalibrated: float = float("inf")
    flops: float = 0.0
    pruning: float = 0.0


class Walker:
    """Takes the steps. rows, length: of a batch; calibration_rows: of it."""

    def __init__(
        self,
        space: Space,
        plan: PruningPlan,
        step_flops: StepFlops,
        *,
        rows: int,
        length: int,
        calibration_rows: int,
    ) -> None:
        self._space, self._plan, self._step_flops = space, plan, step_flops
        self._rows, self._length, self._calibration_rows = rows, length, calibration_rows
        self._correction_rows = min(max(1, plan.correction_tokens // length), rows)
        self._needs = criterion(plan.options.saliency).needs
        self._types = [name for name in PRUNING_TYPES if name in plan.options.types]
        heads = [int(spec.axes[0]) for spec in space.params if spec.name == HEAD_WEIGHT]
        self._vocabulary = heads[0] if heads else 0  # of an LM head that is not the embedding
        self._parameters = lru_cache(1 << 16)(lambda widths: int(space.num_params(widths)))

    def walk(self, steps: int) -> Walk:
        """The whole run."""
        source = self._space.widths
        done = Walk(source, source, self._plan.landings[0].balanced())
        for step in range(1, steps + 1):
            done.flops += self._step_flops(done.allocated)
            self._prune(done, step * self._rows * self._length)
        done.flops += done.pruning
        return done

    def _next_type(self, done: Walk) -> str | None:
        """That of which the largest share of its way is left; None at the end of all."""
        if landed(self._plan.landings, done.rung, done.live):
            return None
        ahead = [name for name in self._types if done.live.count(name) > done.goal.count(name)]
        return most_left(ahead, done.live, self._space.widths, done.goal)

    def _due(self, done: Walk, position: int) -> bool:
        plan = self._plan
        return self._next_type(done) is not None and plan.schedule.wants(
            position, plan.landings[done.rung].cost(done.live), done.events
        )

    def _prune(self, done: Walk, position: int) -> None:
        """What PruningEngine.step does at a position, and the compaction after it."""
        options, bundles, at_rung = self._plan.options, 0, False
        if options.gathers and self._needs == "inputs" and self._next_type(done) and not self._due(done, position):
            done.pruning += self._inputs(done).base
        while not at_rung and self._due(done, position):
            if self._needs == "gradient" and bundles:
                done.pruning += self._step_flops(done.allocated)
                done.refreshes += 1
            elif self._needs == "inputs":
                done.pruning += self._inputs(done).total if self._vocabulary else self._inputs(done).base
            parameters = self._parameters(done.live)
            stale = bundles or done.uncalibrated >= options.bound * parameters
            if options.calibrated and options.order == "saliency" and stale:
                self._calibrate(done)
            before, at_rung = done.live, self._take_bundle(done, position)
            if options.correction:
                self._correct(done, before)
            bundles += 1
        self._compact(done, exactly=at_rung or self._next_type(done) is None)

    def _calibrate(self, done: Walk) -> None:
        forward = forward_flops(self._space, self._calibration_rows, self._length, done.allocated)
        landing = self._plan.landings[done.rung]
        measured = sum(landing.may_fall(name, done.live) for name in self._types)
        done.pruning += (1 + measured) * forward.total
        done.uncalibrated = 0.0

    def _take_bundle(self, done: Walk, position: int) -> bool:
        """Events until the schedule is content or the bound is met; whether a rung of the ladder is reached."""
        removed, limit = 0.0, self._plan.options.bound * self._parameters(done.live)
        landings = self._plan.landings
        while self._due(done, position):
            name = self._next_type(done)
            assert name is not None
            after = done.live.after(name)
            falling = self._parameters(done.live) - self._parameters(after)
            if removed and removed + falling > limit:
                break
            done.live, done.events, removed = after, done.events + 1, removed + falling
            left, done.rung = done.rung, rung_after(landings, done.rung, done.live)
            if done.rung > left:
                done.goal = landings[done.rung].balanced(within=done.live)
                return True
        done.uncalibrated += removed
        return False

    def _inputs(self, done: Walk) -> ForwardFlops:
        return forward_flops(self._space, self._correction_rows, self._length, done.allocated)

    def _correct(self, done: Walk, before: Widths) -> None:
        """The pass that captures inputs, a solve for each tensor that loses inputs, and its readers' update."""
        inputs, wide, dim = self._inputs(done), done.allocated, self._space.head_dim
        tokens = self._correction_rows * self._length
        fallen = {name: before.count(name) - done.live.count(name) for name in self._types}
        head = self._vocabulary if fallen.get(STEM) else 0
        outputs = {
            FFN_TYPE: (wide.intermediate, 1, [wide.hidden]),
            ATTENTION: (wide.heads * dim, before.queries_per_kv * dim, [wide.hidden]),
            ATTENTION_QUERY: (wide.heads * dim, before.kv_heads * dim, [wide.hidden]),
            STEM: (wide.hidden, 1, [(wide.heads + 2 * wide.kv_heads) * dim, 2 * wide.intermediate]),
        }
        for name, (width, each, sites) in outputs.items():
            removed = fallen.get(name, 0) * each
            for reads in sites if removed else ():
                solve = solve_flops((wide.layers, tokens, width), removed, ITERATIONS)
                done.pruning += solve + 2 * wide.layers * width * reads * removed
        if head:
            done.pruning += solve_flops((1, tokens, wide.hidden), fallen[STEM], ITERATIONS)
            done.pruning += 2 * wide.hidden * head * fallen[STEM]
        done.pruning += inputs.total if head else inputs.base

    def _compact(self, done: Walk, *, exactly: bool) -> None:
        widths = narrower(done.live, done.allocated, self._plan, self._parameters, exactly=exactly)
        if widths is not None:
            done.allocated = widths
            done.compactions += 1
