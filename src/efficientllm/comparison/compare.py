"""The comparison from end to end: tune each arm's rate, run it over the seeds, do that under each budget, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from efficientllm.comparison.arms import Arm, arm_recipe
from efficientllm.comparison.budget import BUDGETS, batch_tokens, close, source_flops, tail_cost, tokens_for_flops
from efficientllm.comparison.runner import Outcome, run_all
from efficientllm.comparison.tasks import measure_tasks
from efficientllm.config import Recipe
from efficientllm.errors import UsageError
from efficientllm.evaluation.harness import EvalRequest, check_tasks
from efficientllm.models.loading import load_config
from efficientllm.models.space import space_of
from efficientllm.pruning.groups import Space
from efficientllm.reporting.journal import read_journal
from efficientllm.sizes import format_count

Say = Callable[[str], None]


@dataclass
class ArmResult:
    """One arm under one budget. rates: every rate tried -> loss with the first seed; runs: by seed, at the best."""

    arm: Arm
    rates: dict[float, float | None] = field(default_factory=dict)
    rate: float | None = None
    runs: dict[int, Outcome] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What is compared and where it is kept."""

    recipe: Recipe
    space: Space
    arms: Sequence[Arm]
    seeds: Sequence[int]
    budgets: Sequence[str]
    grid: Sequence[float]
    folder: Path
    devices: int = 0
    tasks: EvalRequest | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        arms: Sequence[Arm],
        seeds: Sequence[int],
        budgets: Sequence[str],
        grid: Sequence[float],
        folder: Path,
        tasks: EvalRequest | None = None,
    ) -> Comparison:
        """Checks what can be checked before anything is spent. Raises UsageError."""
        if recipe.prune is None:
            raise UsageError("the recipe has no prune section: the loop, which all arms are compared with, needs one")
        if recipe.prune.mode != "loop":
            raise UsageError(f"prune.mode is {recipe.prune.mode}: set it to loop; the arms set their own modes")
        if recipe.init != "pretrained" or recipe.resume is not None:
            raise UsageError("a comparison starts from a pretrained source: drop init and resume from the recipe")
        twice = next((seed for seed in seeds if list(seeds).count(seed) > 1), None)
        if twice is not None or not seeds:
            said = f"seed {twice} is given twice: " if seeds else "there is no seed: "
            raise UsageError(said + "runs of one seed are equal and no evidence; give different ones")
        unknown = next((budget for budget in budgets if budget not in BUDGETS), None)
        if unknown is not None:
            raise UsageError(f"'{unknown}' is no budget: choose from {', '.join(BUDGETS)}")
        if not grid or min(grid) <= 0 or len(set(grid)) < len(grid):
            raise UsageError("--lr-grid wants different positive multiples of train.lr, such as 0.5,1,2")
        space = space_of(load_config(recipe.source, trust_remote_code=recipe.trust_remote_code))
        if "pipeline" in budgets:
            source_flops(recipe, space)
        if tasks is not None:
            check_tasks(tasks)
        ordered = [budget for budget in BUDGETS if budget in {"tokens", *budgets}]
        devices = torch.cuda.device_count()
        return cls(recipe, space, arms, seeds, ordered, grid, folder, devices, tasks)


def run_comparison(comparison: Comparison, say: Say) -> dict[str, dict[str, ArmResult]]:
    """Budget -> arm -> result. Equal tokens come first: they say what each arm costs, which other budgets need.

    An arm that cannot be run is left out with its sentence, the others go on. Raises UsageError where the loop
    itself cannot be run, Interrupted where a signal came.
    """
    loop = ArmResult(comparison.arms[0])
    others = [ArmResult(arm) for arm in comparison.arms[1:]]
    count = len(comparison.arms) * (len(comparison.grid) + len(comparison.seeds) - 1)
    tokens = format_count(comparison.recipe.train.tokens)
    say(f"equal tokens: {count} runs of {tokens} tokens; finished ones are only read")
    _tune_and_run(comparison, [loop], {}, say)
    if loop.problem:
        raise UsageError(f"the loop cannot be run, and all arms are compared with it: {loop.problem}")
    summaries = {seed: _summary(outcome) for seed, outcome in loop.runs.items()}
    _tune_and_run(comparison, others, summaries, say)
    results = {"tokens": {result.arm.name: result for result in [loop, *others]}}
    for budget in comparison.budgets[1:]:
        results[budget] = _other_budget(comparison, results["tokens"], budget, say)
    if comparison.tasks is not None:
        done = [run for arms in results.values() for arm in arms.values() for run in arm.runs.values()]
        measure_tasks(done, comparison.tasks, comparison.recipe.train.device, say)
    return results


def _summary(outcome: Outcome) -> dict[str, Any]:
    assert outcome.summary is not None
    return outcome.summary


def _tune_and_run(
    comparison: Comparison, results: Sequence[ArmResult], loops: Mapping[int, Mapping[str, Any]], say: Say
) -> None:
    """Each arm at every rate with the first seed, then at its best one with the others."""
    first, base = comparison.seeds[0], comparison.recipe.train
    tried = [(result, scale * base.lr) for result in results for scale in comparison.grid]
    outcomes = _run(comparison, [(result, first, lr, base.tokens) for result, lr in tried], "tokens", loops, say)
    for result in results:
        mine = [(lr, outcome) for (other, lr), outcome in zip(tried, outcomes, strict=True) if other is result]
        for lr, outcome in mine:
            loss = None if outcome.summary is None else float(outcome.summary["result"]["validation_loss"])
            result.rates[lr] = loss if loss is not None and math.isfinite(loss) else None
        done = {lr: loss for lr, loss in result.rates.items() if loss is not None}
        if not done:
            result.problem = next((o.problem for _, o in mine if o.problem), "its loss diverged at every rate")
            say(f"{result.arm.name} is left out: {result.problem}")
            continue
        result.rate = min(done, key=lambda lr: done[lr])
        result.runs[first] = dict(mine)[result.rate]
    left = [result for result in results if result.rate is not None]
    work = [(result, seed, float(result.rate or 0), base.tokens) for result in left for seed in comparison.seeds[1:]]
    for (result, seed, _, _), outcome in zip(work, _run(comparison, work, "tokens", loops, say), strict=True):
        _keep(result, seed, outcome, say)


def _keep(result: ArmResult, seed: int, outcome: Outcome, say: Say) -> None:
    loss = None if outcome.summary is None else outcome.summary["result"]["validation_loss"]
    if loss is not None and math.isfinite(loss):
        result.runs[seed] = outcome
    elif result.problem is None:
        result.problem = f"seed {seed}: {outcome.problem or 'its loss diverged'}"
        say(f"{result.arm.name} is left out: {result.problem}")


def _run(
    comparison: Comparison,
    work: Sequence[tuple[ArmResult, int, float, int]],
    budget: str,
    loops: Mapping[int, Mapping[str, Any]],
    say: Say,
) -> list[Outcome]:
    """Runs (arm, seed, rate, tokens), each in FOLDER/budget/arm/seed-S-lr-R."""
    outcomes: list[Outcome | None] = [None] * len(work)
    recipes: dict[int, Recipe] = {}
    for index, (result, seed, lr, tokens) in enumerate(work):
        folder = comparison.folder / budget / result.arm.name.replace(":", "-") / f"seed-{seed}-lr-{lr:g}"
        try:
            recipes[index] = arm_recipe(
                result.arm,
                comparison.recipe,
                comparison.space,
                seed=seed,
                lr=lr,
                tokens=tokens,
                folder=str(folder),
                loop=loops.get(seed),
            )
        except UsageError as error:
            outcomes[index] = Outcome(None, None, str(error))
    for index, outcome in zip(
        recipes, run_all(list(recipes.values()), devices=comparison.devices, say=say), strict=True
    ):
        outcomes[index] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _tokens_within(arm: Arm, summary: Mapping[str, Any], budget: float, batch: int) -> int:
    at_rest = arm.base in ("one-shot", "iterative")
    journal = Path(summary["result"]["path"]).parent / "metrics.jsonl"
    tail = tail_cost(read_journal(journal)) if at_rest else None
    return tokens_for_flops(summary["tokens"], summary["flops"], budget, batch, tail=tail)


def _other_budget(
    comparison: Comparison, equal: Mapping[str, ArmResult], budget: str, say: Say
) -> dict[str, ArmResult]:
    """Arms again, at the rates found for equal tokens, each on as many tokens as the loop's FLOPs of its seed pay for.

    Under `pipeline` only scratch arms run, with what the source's own pretraining cost on top.
    """
    loop = equal["loop"]
    loops = {seed: _summary(outcome) for seed, outcome in loop.runs.items()}
    extra = source_flops(comparison.recipe, comparison.space) if budget == "pipeline" else 0
    batch, results, work = batch_tokens(comparison.recipe), {"loop": loop}, []
    say(f"budget {budget}: arms whose cost is within 1 % of the loop's are not run again")
    for name, known in equal.items():
        if name == "loop" or known.problem or (budget == "pipeline" and known.arm.base != "scratch"):
            continue
        result = results[name] = ArmResult(known.arm, known.rates, known.rate)
        for seed, outcome in known.runs.items():
            allowed = float(loops[seed]["flops"]) + extra
            summary = _summary(outcome)
            if close(float(summary["flops"]), allowed):
                result.runs[seed] = outcome
                continue
            try:
                tokens = _tokens_within(known.arm, summary, allowed, batch)
            except UsageError as error:
                _keep(result, seed, Outcome(None, None, str(error)), say)
                continue
            work.append((result, seed, float(known.rate or 0), tokens))
    for (result, seed, _, _), outcome in zip(work, _run(comparison, work, budget, loops, say), strict=True):
        _keep(result, seed, outcome, say)
    return results
