"""Validation takes its share of a run and no more, unless the recipe says otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from conftest import World
from efficientllm.config import Recipe
from efficientllm.errors import UsageError
from efficientllm.jobs.prune import run
from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.loading import load_config
from efficientllm.models.space import space_of
from efficientllm.planning.plan import estimate_of
from efficientllm.training.planning import pruning_plan
from efficientllm.training.run_plan import run_plan
from efficientllm.training.validation_pace import ValidationPace, validation_pace

LENGTH = 32


def recipe_of(world: World, tokens: int, *, prune: dict[str, Any] | None = None, **settings: object) -> Recipe:
    content: dict[str, Any] = world.recipe(
        "paced",
        train={"tokens": tokens, "batch_tokens": 1024},
        run={"validate_every": "auto", "checkpoint_every": "50%"} | settings,
    )
    content["prune"] = content["prune"] | prune if prune else None
    return Recipe.model_validate(content)


def pace_of(world: World, recipe: Recipe) -> ValidationPace:
    config = load_config(str(world.folder / "source"))
    return validation_pace(recipe, space_of(config), pruning_plan(recipe, config))


def test_less_than_a_token_is_a_token(world: World) -> None:
    assert pace_of(world, recipe_of(world, 40_000, validate_every="0.001%")).every == 1


@pytest.mark.parametrize("target", [None, "50%", "20%"])
@pytest.mark.parametrize("tokens", [100_000, 3_000_000, 10**9])
def test_by_default_it_takes_at_most_five_percent_of_what_the_run_spends(
    world: World, tokens: int, target: str | None
) -> None:
    recipe = recipe_of(world, tokens, prune={"target": target} if target else None)
    space = space_of(load_config(str(world.folder / "source")))
    plan = pruning_plan(recipe, load_config(str(world.folder / "source")))
    pace = validation_pace(recipe, space, plan)
    final = forward_flops(space, 1, LENGTH, plan.feasible.balanced() if plan else None)
    least = recipe.train.steps(LENGTH) * 32 * training_flops(final)
    assert pace.flops <= 0.05 * least
    assert pace.flops > 0.01 * least or pace.rows * LENGTH == 262_144
    assert 8 <= pace.rows <= 262_144 // LENGTH
    times = -(-tokens // pace.every)
    assert times == 1 or pace.rows * LENGTH >= 16_384
    assert pace.flops == pace.rows * (forward_flops(space, 1, LENGTH).total + times * final.total)
    assert pace.said is not None
    assert f"{pace.rows:,} rows" in pace.said


def test_the_plan_counts_it(world: World) -> None:
    recipe = recipe_of(world, 100_000, prune={"target": "50%"})
    plan = estimate_of(run_plan(recipe, load_config(str(world.folder / "source"))), bf16=False)
    pace = pace_of(world, recipe)
    assert plan.validation_flops == pace.flops < 0.05 * plan.flops
    assert pace.said in plan.notes


def test_the_shortest_run_still_gets_eight_rows_twice_and_is_told_what_they_cost(world: World) -> None:
    recipe = recipe_of(world, 1024)
    pace = pace_of(world, recipe)
    assert (pace.rows, pace.every) == (8, 1024)
    row = forward_flops(space_of(load_config(str(world.folder / "source"))), 1, LENGTH).total
    assert pace.flops == 2 * 8 * row
    assert pace.said is not None
    assert "8 rows (256 tokens) of the source and once, at the end of the run, at most 16." in pace.said


def test_what_the_recipe_says_is_taken_as_it_is(world: World) -> None:
    both = pace_of(world, recipe_of(world, 10_240, validation_tokens="256Ki", validate_every="10%"))
    assert (both.rows, both.every, both.said) == (8192, 1024, None)
    often = pace_of(world, recipe_of(world, 1_024_000, validate_every="10%"))
    assert often.every == 102_400
    assert often.rows < pace_of(world, recipe_of(world, 1_024_000, validate_every="100%")).rows
    much = pace_of(world, recipe_of(world, 1_024_000, validation_tokens="256Ki"))
    assert (much.rows, much.every) == (8192, 1_024_000)
    assert "run.validation_tokens and" not in str(much.said)


def test_a_run_says_it_and_does_it(world: World) -> None:
    recipe = recipe_of(world, 16_384)
    lines: list[str] = []
    folder = world.folder / "runs" / "paced"
    run(recipe, lines.append)
    pace = pace_of(world, recipe)
    assert pace.said in lines
    metrics = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "validation_loss" in line] == [16]


def test_a_branch_must_be_measured_on_the_rows_of_its_source(world: World) -> None:
    recipe = recipe_of(world, 32_768, validate_every="50%", dir=str(world.folder / "runs" / "trunk"))
    run(recipe, lambda line: None)
    saved = sorted((world.folder / "runs" / "trunk" / "checkpoints").glob("step-*"))[-1]
    longer = recipe_of(world, 131_072, validate_every="50%", dir=str(world.folder / "runs" / "branch"))
    longer = longer.model_copy(update={"resume": str(saved)})
    rows = pace_of(world, recipe).rows
    assert pace_of(world, longer).rows != rows
    with pytest.raises(UsageError, match=f"set run.validation_tokens to {rows * LENGTH}"):
        run(longer, lambda line: None)


def test_where_tokens_are_auto_the_stretch_is_bound_on_resume(world: World) -> None:
    from efficientllm.jobs.run_folder import fingerprint

    prints = {
        fingerprint(recipe_of(world, 1_024_000, validation_tokens=tokens, validate_every=every))
        for tokens in ("auto", 4096)
        for every in ("10%", "20%")
    }
    assert len(prints) == 3
