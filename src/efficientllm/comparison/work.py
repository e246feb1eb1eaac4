"""What is compared, what has come of each arm, and one batch of runs of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from efficientllm.comparison.arms import Arm, arm_recipe
from efficientllm.comparison.runner import Outcome, run_all
from efficientllm.config import Recipe
from efficientllm.errors import UsageError
from efficientllm.evaluation.harness import EvalRequest, check_tasks
from efficientllm.jobs.run_folder import OlderRun, RunFolder, fingerprint
from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.loading import load_config
from efficientllm.pruning.groups import Space
from efficientllm.training.run_plan import RunPlan, run_plan

BUDGETS = ("tokens", "flops", "pipeline")

Say = Callable[[str], None]
Loops = Mapping[int, Mapping[str, Any]]  # seed -> summary of its loop
Work = tuple["ArmResult", int, float, int]  # arm, seed, peak rate, tokens


@dataclass
class ArmResult:
    """One arm under one budget.

    rates: every rate tried -> loss with the first seed; runs: by seed, at the best. allowed: by seed, the FLOPs that
    the budget grants; empty at equal tokens. inherited: FLOPs of the source's pretraining where this budget counts
    them and the arm stands on it. problem: why no claim can be made about it. task_problems: by task, why it is not
    measured.
    """

    arm: Arm
    rates: dict[float, float | None] = field(default_factory=dict)
    rate: float | None = None
    runs: dict[int, Outcome] = field(default_factory=dict)
    allowed: dict[int, float] = field(default_factory=dict)
    inherited: int = 0
    problem: str | None = None
    task_problems: dict[str, str] = field(default_factory=dict)

    def keep(self, seed: int, outcome: Outcome, say: Say) -> None:
        """Takes the run of a seed, or the reason why there is none."""
        if loss_of(outcome) is not None:
            self.runs[seed] = outcome
        else:
            self.fail(f"seed {seed}: {outcome.problem or 'its loss diverged'}", say)

    def fail(self, problem: str, say: Say) -> None:
        """Notes the first thing that went wrong, and says it."""
        if self.problem is None:
            self.problem = problem
            say(f"no claim about {self.arm.name}: {problem}")


@dataclass(frozen=True)
class Comparison:
    """What is compared and where it is kept. plan: of the loop, as the user's recipe has it."""

    plan: RunPlan
    arms: Sequence[Arm]
    seeds: Sequence[int]
    budgets: Sequence[str]
    grid: Sequence[float]
    folder: Path
    devices: int = 0
    tasks: EvalRequest | None = None
    source_tokens: int | None = None

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def space(self) -> Space:
        return self.plan.space

    def source_flops(self) -> int:
        """Of the source's own pretraining, for the budget `pipeline`, at this recipe's sequence length."""
        length = self.plan.length
        return (self.source_tokens or 0) * training_flops(forward_flops(self.space, 1, length)) // length

    def arm_recipe(
        self, arm: Arm, *, seed: int, lr: float, tokens: int, folder: Path, loop: Mapping[str, Any] | None
    ) -> Recipe:
        """What one arm runs (see arms.py). Raises UsageError where that is no valid recipe."""
        cost = self.plan.pruning.feasible.cost if self.plan.pruning else None
        asked: dict[str, Any] = {"seed": seed, "lr": lr, "tokens": tokens, "folder": str(folder)}
        return arm_recipe(arm, self.recipe, self.space, loop=loop, cost=cost, **asked)

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
        source_tokens: int | None = None,
    ) -> Comparison:
        """Checks what can be checked before anything is spent. source_tokens: that the source was pretrained on.

        Raises UsageError.
        """
        if recipe.prune is None:
            raise UsageError("the recipe has no prune section: the loop, which all arms are compared with, needs one")
        if recipe.prune.mode != "loop":
            raise UsageError(f"prune.mode is {recipe.prune.mode}: set it to loop; the arms set their own modes")
        if recipe.prune.vocabulary:
            raise UsageError("prune.types has vocab, after which arms do not predict the same tokens: leave it out")
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
        config = load_config(recipe.source)
        plan = run_plan(recipe, config)
        if recipe.run.validation_tokens == "auto":  # one number: all arms are compared on those rows
            run = recipe.run.model_copy(update={"validation_tokens": plan.pace.rows * plan.length})
            plan = replace(plan, recipe=recipe.model_copy(update={"run": run}))
        if "pipeline" in budgets and source_tokens is None:
            raise UsageError(
                "--budget pipeline needs to know what the source's own pretraining cost: give --source-tokens, the "
                "tokens that it was trained on, such as 2T"
            )
        if tasks is not None:
            check_tasks(tasks)
        ordered = [budget for budget in BUDGETS if budget in {"tokens", *budgets}]
        # Runs side by side, one a GPU; a CPU, or one GPU of the user's choice, would only be shared among them.
        devices = torch.cuda.device_count() if recipe.train.device in ("auto", "cuda") else 0
        return cls(plan, arms, seeds, ordered, grid, folder, devices, tasks, source_tokens)


def loss_of(outcome: Outcome) -> float | None:
    """Validation loss at the end; None where the run failed or diverged."""
    loss = None if outcome.summary is None else outcome.summary["result"]["validation_loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else None


def summary_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.summary is not None
    return outcome.summary


def run_work(comparison: Comparison, work: Sequence[Work], budget: str, loops: Loops, say: Say) -> list[Outcome]:
    """Outcomes in the order of the work, each run in FOLDER/budget/arm/seed-S-lr-R (see `placed`)."""
    outcomes: list[Outcome | None] = [None] * len(work)
    recipes: dict[int, Recipe] = {}
    for index, (result, seed, lr, tokens) in enumerate(work):
        folder = comparison.folder / budget / result.arm.name.replace(":", "-") / f"seed-{seed}-lr-{lr:g}"
        try:
            loop = loops.get(seed)
            recipe = comparison.arm_recipe(result.arm, seed=seed, lr=lr, tokens=tokens, folder=folder, loop=loop)
            recipes[index] = placed(recipe)
        except UsageError as error:
            outcomes[index] = Outcome(None, None, str(error))
    found = run_all(list(recipes.values()), devices=comparison.devices, say=say)
    for index, outcome in zip(recipes, found, strict=True):
        outcomes[index] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def placed(recipe: Recipe) -> Recipe:
    """The recipe in its own run folder, or, where that holds a run of another recipe, in one beside it.

    An arm that takes the loop's shape is another run once the loop's best rate has changed, and so is one that is
    given other tokens to meet a budget; both runs stay, and each is found again by the recipe that it holds, since
    another version may have named its folder by another fingerprint. So does one that this version does not take.
    """
    folder = RunFolder(recipe.run.dir)
    with suppress(OlderRun):
        if folder.difference(recipe) is None:
            return recipe
    beside = sorted(folder.path.parent.glob(f"{folder.path.name}-{'?' * len(fingerprint(recipe))}"))
    found = next((str(path) for path in beside if _holds(RunFolder(path), recipe)), None)
    run = recipe.run.model_copy(update={"dir": found or f"{recipe.run.dir}-{fingerprint(recipe)}"})
    return recipe.model_copy(update={"run": run})


def _holds(folder: RunFolder, recipe: Recipe) -> bool:
    try:
        return folder.begun and folder.difference(recipe) is None
    except UsageError:
        return False
