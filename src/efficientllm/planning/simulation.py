"""A run simulated by the engine's own decisions, without a model: what it will do, and what that costs.

Where damage would choose, it goes by shapes alone (pruning/decision.py: ByShape): a run will go by other widths of the
same size, at about the same cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from efficientllm.models.experts import balance_of
from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.pruning.correction import EXPECTED, solve_flops
from efficientllm.pruning.criteria import criteria_of
from efficientllm.pruning.decision import ByShape, Course, Standing
from efficientllm.pruning.dimensions import DIMENSIONS
from efficientllm.pruning.ledger import Ledger
from efficientllm.pruning.readers import read_tensors
from efficientllm.pruning.widths import Widths
from efficientllm.training.compaction import compaction_widths
from efficientllm.training.passes import kept_every, passes_over, rows_by_use
from efficientllm.training.run_plan import RunPlan

StepFlops = Callable[[Widths], Ledger]


@dataclass
class Simulated:
    """What a run has done so far. over: whether it is where it was to end, and compacted to that. flops: by part;
    pruning: those of looks and correction."""

    at: Standing
    allocated: Widths
    over: bool = False
    compactions: int = 0
    refreshes: int = 0
    fresh: bool = False
    flops: Ledger = field(default_factory=Ledger)

    @property
    def pruning(self) -> float:
        return self.flops.looks + self.flops.correction


class Simulation:
    """Takes the steps of a run that prunes. step_flops: of one, by the allocated widths."""

    def __init__(self, run: RunPlan, step_flops: StepFlops) -> None:
        assert run.pruning is not None
        space, plan, train = run.space, run.pruning, run.recipe.train
        self._space, self._plan, self._step_flops, self._steps = space, plan, step_flops, run.steps
        self._batch, self._length = run.batch_rows, run.length
        self._recomputes, self._compiles = train.gradient_checkpointing, train.compile
        # A step's own pass shows its gates.
        self._watched = not (train.compile or run.recipe.distill or balance_of(run.source))
        self._rows = rows_by_use(plan, self._batch, self._length)
        chosen = criteria_of(plan.options.saliency, plan.options.types)
        self._needs = {each.needs for each in chosen.values()}
        self._reading = {each.name: each for each in chosen.values() if each.needs == "inputs"}.values()
        self._types = [name for name in space.types if name in plan.options.types]
        self._course = Course(plan.milestones, plan.schedule)
        self._guide, self._sites = ByShape(self._types), read_tensors(space)

    def run(self) -> Simulated:
        """The whole run."""
        source, batch = self._space.widths, self._batch * self._length
        done = Simulated(Standing(source), source)
        for step in range(self._steps):
            if self._plan.at_rest and not done.over:
                self._prune(done, step * batch)
            done.flops.add(self._step_flops(done.allocated))
            if not (self._plan.at_rest or done.over):
                done.fresh = self._watched or "gates" not in self._needs
                self._prune(done, (step + 1) * batch)
        return done

    def _prune(self, done: Simulated, position: int) -> None:
        """What PruningEngine.step does at a position, and the compaction after it."""
        options, bundles, milestone = self._plan.options, 0, done.at.milestone
        ready = not (self._plan.at_rest or self._compiles)  # inputs that the step's own pass has kept
        while done.at.milestone == milestone and self._course.due(done.at, position):
            seen = self._refresh(done, options.look_batches if not bundles else 0, ready=ready)
            if options.correction and not seen:
                done.flops.correction += 0 if ready else self._inputs(done)
                seen = self._rows_of(self._batch) if ready else self._rows["inputs"]
            ready = False
            before = done.at
            done.at = self._course.bundle(done.at, position, self._guide, options.bound)[-1].after
            done.fresh = False
            if options.correction:
                done.flops.correction += self._solves(done.allocated, before.widths, done.at.widths, seen)
            bundles += 1
        done.over = self._course.finished(done.at)
        self._compact(done, exactly=done.at.milestone > milestone or done.over)

    def _refresh(self, done: Simulated, batches: int, *, ready: bool) -> int:
        """Passes for scores that are not fresh. Returns the rows of inputs that they have met."""
        seen, looked = 0, bool(self._needs & {"gradient", "gates"}) and not done.fresh
        if looked:
            passes = passes_over(self._rows, "gradient", batches)
            done.refreshes += passes
            passed = forward_flops(self._space, self._rows["gradient"], self._length, done.allocated)
            done.flops.looks += passes * training_flops(passed, gradient_checkpointing=self._recomputes)
            seen = 0 if self._compiles else self._rows_of(self._rows["gradient"])
        done.fresh = True
        if "inputs" in self._needs:
            passes = 1 if looked else passes_over(self._rows, "inputs", batches)
            if not seen:
                done.flops.looks += self._inputs(done) * (passes - ready)
                seen = self._rows_of(self._batch) if ready else self._rows["inputs"]
            done.flops.looks += passes * self._statistics(done.allocated, seen)
        return seen

    def _statistics(self, widths: Widths, rows: int) -> int:
        """Of the criteria that look at inputs, of so many rows."""
        flops = 0
        for axis, _, layered in self._sites:
            number = (widths.layers if layered else 1) * (widths["experts"] if DIMENSIONS[axis].apart else 1)
            tokens, width = rows * self._length, self._space.axis_length(axis, widths)
            flops += number * sum(each.statistic_flops(tokens, width) for each in self._reading)
        return flops

    def _rows_of(self, rows: int) -> int:
        """Those of a pass over so many rows whose inputs are kept."""
        return -(-rows // kept_every(rows, self._rows["inputs"]))

    def _inputs(self, done: Simulated) -> int:
        return forward_flops(self._space, self._rows["inputs"], self._length, done.allocated).base

    def _solves(self, wide: Widths, before: Widths, after: Widths, rows: int) -> int:
        """A solve for each tensor that loses inputs, of so many rows, and its readers' update. A type that falls takes
        of every axis that its units have entries along (dimensions.py)."""
        flops = 0
        for name in self._types:
            left = before.after(name, before.count(name) - after.count(name))
            for (axis, _, layered), outputs in self._sites.items():
                removed = self._space.axis_length(axis, before) - self._space.axis_length(axis, left)
                if removed:
                    layers, width = wide.layers if layered else 1, self._space.axis_length(axis, wide)
                    reads = sum(math.prod(self._space.axis_length(one, wide) for one in each) for each in outputs)
                    tokens = rows * self._length
                    if DIMENSIONS[axis].apart:  # each expert by itself, on the tokens that have chosen it
                        layers, tokens = layers * wide["experts"], tokens * self._space.copies(axis) // wide["experts"]
                    flops += solve_flops((layers, tokens, width), removed, EXPECTED)
                    flops += 2 * layers * width * reads * removed
        return flops

    def _compact(self, done: Simulated, *, exactly: bool) -> None:
        feasible, frees = self._plan.feasible, self._plan.compact_at
        widths = compaction_widths(done.at.widths, done.allocated, feasible, exactly=exactly, frees=frees)
        if widths is not None:
            done.allocated = widths
            done.compactions += 1
