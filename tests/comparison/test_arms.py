"""Arms: their names, their recipes, what is refused."""

from __future__ import annotations

import pytest

from conftest import World
from efficientllm.comparison.arms import DEFAULT_ARMS, arm_recipe, parse_arm, parse_arms
from efficientllm.config import PruneConfig, Recipe, Trait, WidthTarget
from efficientllm.errors import UsageError
from efficientllm.models.loading import load_config
from efficientllm.models.space import space_of
from efficientllm.pruning.shapes import proportional_widths
from efficientllm.pruning.widths import Widths
from efficientllm.training.planning import cost_of

LOOP = {
    "result": {
        "path": "",
        "parameters": 12_000,
        "widths": {"layers": 2, "hidden": 30, "heads": 2, "kv_heads": 1, "intermediate": 33},
    }
}


@pytest.mark.parametrize("name", [*DEFAULT_ARMS, "iterative", "one-shot:wanda@loop+uncorrected+distill", "loop:fisher"])
def test_every_arm_has_a_valid_recipe(world: World, name: str) -> None:
    recipe = Recipe.model_validate(world.recipe("base", prune={"correction": "second-order"}))
    space = space_of(load_config(recipe.source))
    loop = {"result": LOOP["result"] | {"path": recipe.source}}
    arm = parse_arm(name)
    made = arm_recipe(arm, recipe, space, seed=5, lr=3e-3, tokens=512, folder="x/y", loop=loop)
    assert (made.train.seed, made.train.lr, made.train.tokens, made.run.dir) == (5, 3e-3, 512, "x/y")
    assert (made.distill is not None) == ("distill" in name)
    assert made.data == recipe.data
    if not arm.prunes:
        assert made.prune is None
        assert made.init == ("random" if arm.base == "scratch" else "pretrained")
        return
    assert made.prune is not None
    assert recipe.prune is not None
    others = {key for key in PruneConfig.model_fields if getattr(made.prune, key) != getattr(recipe.prune, key)}
    assert others <= PruneConfig.having(Trait.ARM) | made.prune._idle().keys()
    assert made.prune.correction == ("none" if "uncorrected" in name else "second-order")
    assert made.prune.mode == ("loop" if arm.base == "fixed" else arm.base)
    assert isinstance(made.prune.target, WidthTarget) == arm.needs_loop
    if arm.loops_shape:
        assert made.prune.target.hidden == 30
    if arm.criterion:
        assert made.prune.saliency == arm.criterion


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lop", "did you mean loop"),
        ("one-shot+destill", "did you mean"),
        ("one-shot:wand", "did you mean 'wanda'"),
        ("dense+uncorrected", "prunes nothing"),
        ("fixed@loop", "two shapes"),
        ("loop+distill+distill", "twice"),
    ],
)
def test_unknown_arms_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_arm(name)


def test_the_loop_is_always_there() -> None:
    assert [arm.name for arm in parse_arms(["dense"])] == ["loop", "dense"]
    with pytest.raises(UsageError, match="'dense' is asked for twice"):
        parse_arms(["dense", "dense"])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_proportional_widths_fill_the_budget(world: World, share: float) -> None:
    space = space_of(load_config(str(world.folder / "source")))
    budget = int(share * space.num_params())
    widths = proportional_widths(space, budget)
    assert space.num_params(widths) <= budget
    assert widths.queries_per_kv == space.widths.queries_per_kv
    assert widths.intermediate == pytest.approx(space.widths.intermediate * widths.hidden / space.widths.hidden, abs=1)
    with pytest.raises(ValueError, match="raise the target"):
        proportional_widths(space, 10)


def test_fixed_is_as_dear_as_the_loop_in_what_the_recipe_counts(world: World) -> None:
    """A loop that prunes by KV cache may keep many parameters; matching those would leave `fixed` too large a cache."""
    base = world.recipe("base", prune={"cost": "kv-cache", "target": {"kv_cache": "50%"}, "correction": "none"})
    recipe = Recipe.model_validate(base)
    config = load_config(recipe.source)
    space = space_of(config)
    found = {"layers": 2, "hidden": 40, "heads": 2, "kv_heads": 1, "intermediate": 52}
    assert recipe.prune is not None
    loop = {"result": {"path": "", "parameters": space.num_params(Widths(**found)), "widths": found}}
    cost = cost_of(recipe.prune, config, 32)
    settings = {"seed": 0, "lr": 1e-3, "tokens": 512, "folder": "x", "loop": loop}
    for given, kv_heads in ((cost, 1), (None, 2)):
        made = arm_recipe(parse_arm("fixed"), recipe, space, **settings, cost=given)  # type: ignore[arg-type]
        assert made.prune is not None
        assert isinstance(made.prune.target, WidthTarget)
        assert made.prune.target.kv_heads == kv_heads
