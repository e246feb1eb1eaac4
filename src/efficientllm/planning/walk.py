"""A run walked through step by step by the engine's own rules, without a model: what it will do, and what that costs.

Where damage would choose, the walk heads for the most balanced shape of each landing, and events take the way that
leaves them the same share of their path ("interleaved", pruning/selection.py): a run will go by other widths of the
same size, at about the same cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.parts import HEAD_WEIGHT
from efficientllm.pruning.calibration import CALIBRATION_SHARE, Calibration
from efficientllm.pruning.correction import EXPECTED, solve_flops
from efficientllm.pruning.criteria import criterion
from efficientllm.pruning.dimensions import ATTENTION, ATTENTION_QUERY, FFN_TYPE, PRUNING_TYPES, STEM
from efficientllm.pruning.groups import Space
from efficientllm.pruning.landing import landed, rung_after
from efficientllm.pruning.ledger import Ledger
from efficientllm.pruning.selection import most_left
from efficientllm.pruning.widths import Widths
from efficientllm.training.looks import LookRows
from efficientllm.training.state import PruningPlan, narrower

StepFlops = Callable[[Widths], Ledger]
SETTLES = 3  # measurements of a type until one moves its ratio by no more than a quarter: noise alone moves the second


@dataclass
class Walk:
    """What a run has done so far. flops: by part; pruning: those of looks, calibration and correction."""

    live: Widths
    allocated: Widths
    goal: Widths
    events: int = 0
    compactions: int = 0
    refreshes: int = 0
    rung: int = 0
    fresh: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    measured: Counter[str] = field(default_factory=Counter)
    flops: Ledger = field(default_factory=Ledger)

    @property
    def pruning(self) -> float:
        return self.flops.looks + self.flops.calibration + self.flops.correction


class Walker:
    """Takes the steps. rows, length: of a batch. recomputes, compiles: as train.gradient_checkpointing and
    train.compile."""

    def __init__(
        self,
        space: Space,
        plan: PruningPlan,
        step_flops: StepFlops,
        *,
        rows: int,
        length: int,
        recomputes: bool,
        compiles: bool,
    ) -> None:
        self._space, self._plan, self._step_flops = space, plan, step_flops
        self._batch, self._length, self._recomputes, self._compiles = rows, length, recomputes, compiles
        self._rows = LookRows.of(plan, rows, length)
        self._needs = criterion(plan.options.saliency).needs
        self._types = [name for name in PRUNING_TYPES if name in plan.options.types]
        heads = [int(spec.axes[0]) for spec in space.params if spec.name == HEAD_WEIGHT]
        self._vocabulary = heads[0] if heads else 0  # of an LM head that is not the embedding
        self._parameters = lru_cache(1 << 16)(lambda widths: int(space.num_params(widths)))

    def walk(self, steps: int) -> Walk:
        """The whole run."""
        source, batch = self._space.widths, self._batch * self._length
        done = Walk(source, source, self._plan.landings[0].balanced())
        for step in range(steps):
            if self._plan.at_rest:
                self._prune(done, step * batch)
            done.flops.add(self._step_flops(done.allocated))
            if not self._plan.at_rest:
                done.fresh = self._needs == "gradient"
                self._prune(done, (step + 1) * batch)
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
        ready = not (self._plan.at_rest or self._compiles)  # inputs that the step's own pass has kept
        while not at_rung and self._due(done, position):
            seen = self._look(done, options.gathers if not bundles else 1, ready=ready)
            if options.correction and not seen:
                done.flops.correction += 0 if ready else self._inputs(done)
                seen = self._rows_of(self._batch) if ready else self._rows.correction
            ready = False
            if options.compares_types:
                self._calibrate(done, seen)
            before, at_rung = done.live, self._take_bundle(done, position)
            if options.correction:
                done.flops.correction += self._solves(done.allocated, before, done.live, seen)
            bundles += 1
        self._compact(done, exactly=at_rung or self._next_type(done) is None)

    def _look(self, done: Walk, gathers: int, *, ready: bool) -> int:
        """Passes for scores, where none is fresh. Returns the rows of inputs that they have met."""
        if done.fresh or self._needs not in ("gradient", "inputs"):
            return 0
        done.fresh = True
        if self._needs == "inputs":
            done.flops.looks += self._inputs(done) * (gathers - ready)
            return self._rows_of(self._batch) if ready else self._rows.correction
        done.refreshes += gathers
        passed = forward_flops(self._space, self._rows.gradient, self._length, done.allocated)
        done.flops.looks += gathers * training_flops(passed, gradient_checkpointing=self._recomputes)
        return 0 if self._compiles else self._rows_of(self._rows.gradient)

    def _rows_of(self, rows: int) -> int:
        """Those of a pass over so many rows whose inputs are kept."""
        every = max(1, rows // self._rows.correction)
        return -(-rows // every)

    def _calibrate(self, done: Walk, seen: int) -> None:
        """Types that are due, each settled with its SETTLES-th measurement."""
        landing, options, parameters = self._plan.landings[done.rung], self._plan.options, self._parameters(done.live)
        types = [
            name
            for name in self._types
            if landing.may_fall(name, done.live) and done.calibration.due(name, parameters, options.bound)
        ]
        forward = forward_flops(self._space, self._rows.measure, self._length, done.allocated)
        done.flops.calibration += (1 + len(types)) * forward.total if types else 0
        for name in types:
            done.calibration.update(name, 1.0, 1.0, parameters)
            done.measured[name] += 1
            if done.measured[name] < SETTLES:
                done.calibration.moved.pop(name, None)
            if options.correction:
                share = min(options.bound, CALIBRATION_SHARE) * parameters
                number = max(1, round(share / self._space.event_cost(name, done.live)))
                number = min(number, done.live.count(name) - landing.least(name))
                after = done.live.after(name, number)
                done.flops.calibration += self._solves(done.allocated, done.live, after, seen)

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
                done.fresh = False
                return True
        done.fresh = False
        return False

    def _inputs(self, done: Walk) -> int:
        return forward_flops(self._space, self._rows.correction, self._length, done.allocated).base

    def _solves(self, wide: Widths, before: Widths, after: Widths, rows: int) -> int:
        """A solve for each tensor that loses inputs, of so many rows, and its readers' update."""
        dim, tokens, flops = self._space.head_dim, rows * self._length, 0
        fallen = {name: before.count(name) - after.count(name) for name in self._types}
        outputs = {
            FFN_TYPE: (wide.intermediate, 1, [wide.hidden]),
            ATTENTION: (wide.heads * dim, before.queries_per_kv * dim, [wide.hidden]),
            ATTENTION_QUERY: (wide.heads * dim, before.kv_heads * dim, [wide.hidden]),
            STEM: (wide.hidden, 1, [(wide.heads + 2 * wide.kv_heads) * dim, 2 * wide.intermediate]),
        }
        for name, (width, each, sites) in outputs.items():
            removed = fallen.get(name, 0) * each
            for reads in sites if removed else ():
                solve = solve_flops((wide.layers, tokens, width), removed, EXPECTED)
                flops += solve + 2 * wide.layers * width * reads * removed
        if self._vocabulary and fallen.get(STEM):
            flops += solve_flops((1, tokens, wide.hidden), fallen[STEM], EXPECTED)
            flops += 2 * wide.hidden * self._vocabulary * fallen[STEM]
        return flops

    def _compact(self, done: Walk, *, exactly: bool) -> None:
        widths = narrower(done.live, done.allocated, self._plan, self._parameters, exactly=exactly)
        if widths is not None:
            done.allocated = widths
            done.compactions += 1
