"""Default floors: a third of the proportional shape, and never in a target's way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config
from efficientllm.config import PruneConfig, Recipe
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.space import space_of
from efficientllm.pruning.costs import Params
from efficientllm.pruning.dimensions import PRUNING_TYPES
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Space
from efficientllm.pruning.shapes import Floors, proportional_widths
from efficientllm.pruning.widths import Widths
from efficientllm.training.advisories import advisories_of
from efficientllm.training.planning import options_and_milestones, pruning_plan
from efficientllm.training.targets import alignment_of, floors_of


def space_with(widths: Widths) -> Space:
    return Space(space_of(tiny_config("llama-gqa", num_hidden_layers=widths.layers)).params, widths, 6)


def section(**options: Any) -> PruneConfig:
    return PruneConfig.model_validate(options)


def test_a_third_of_the_proportional_shape_rounded_down_to_the_alignment() -> None:
    space = space_with(Widths(2, 96, 24, 6, 200))
    target = int(0.4 * space.num_params())
    shape = proportional_widths(space, target)
    assert (shape.hidden, shape.kv_heads, shape.intermediate) == (58, 4, 121)
    plain = floors_of(section(target=target, align=1), space, Params(space))
    assert plain == Floors(hidden=19, kv_heads=1, queries_per_kv=1, intermediate=40)
    aligned = floors_of(section(target=target, align=16), space, Params(space))
    assert aligned == Floors(hidden=16, kv_heads=1, queries_per_kv=1, intermediate=32)
    named = floors_of(section(target=target, align=1, floors={"intermediate": 3}), space, Params(space))
    assert named.intermediate == 3


def test_a_ladder_has_the_floors_of_its_last_size() -> None:
    space = space_with(Widths(2, 96, 24, 6, 200))
    _, (first, last) = options_and_milestones(section(target="30%", ladder=["60%"], align=1), space)
    assert [first.least(each) for each in PRUNING_TYPES] == [last.least(each) for each in PRUNING_TYPES]


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        lambda layers, hidden, kv, queries, ffn: Widths(layers, hidden, kv * queries, kv, ffn),
        st.integers(1, 3),
        st.integers(8, 64),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(8, 64),
    ),
    st.floats(0.05, 0.95),
    st.sampled_from([1, 4, 16, 32]),
    st.sets(st.sampled_from(PRUNING_TYPES), min_size=1),
    st.booleans(),
    st.integers(0, 64),
)
def test_default_floors_put_no_target_out_of_reach(
    source: Widths, share: float, step: int, types: set[str], flops: bool, named: int
) -> None:
    """What can be had with floors of one unit, beside those that are named, can be had with the defaults."""
    space = space_with(source)
    cost = FlopsPerToken(space, 16) if flops else Params(space)
    floors = {"hidden": named} if 0 < named <= source.hidden else {}
    target: Any = int(share * cost(source))
    prune = section(
        target={"flops": target} if flops else target,
        cost="flops" if flops else "params",
        types=[each for each in PRUNING_TYPES if each in types],
        align=step,
        floors=floors,
    )
    options = {"types": tuple(prune.types), "align": alignment_of(prune, source), "cost": cost}
    try:
        FeasibleShapes(space, target, floors=Floors(**floors), **options)
    except ValueError:
        return
    FeasibleShapes(space, target, floors=floors_of(prune, space, cost), **options)


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        ({"hidden": 97}, "prune.floors.hidden 97 is above the source's 96; choose at most 96"),
        ({"heads_per_kv": 5}, "prune.floors.heads_per_kv 5 is above the source's 4; choose at most 4"),
        ({"layers": 3}, "prune.floors.layers 3 is above the source's 2; choose at most 2"),
    ],
)
def test_a_floor_above_the_source_is_refused(floor: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_and_milestones(section(target="40%", floors=floor), space_with(Widths(2, 96, 24, 6, 200)))


@pytest.mark.parametrize(
    ("prune", "idle"),
    [
        ({"target": "85%", "types": ["ffn"]}, "hidden"),
        ({"target": {"kv_cache": "60%"}, "cost": "kv-cache"}, "hidden, prune.floors.intermediate"),
        ({"target": {"hidden": 30}}, "intermediate"),
        ({"target": "60%"}, None),
    ],
)
def test_floors_without_effect_are_named(prune: dict[str, Any], idle: str | None) -> None:
    """Of a type that is left out, that the cost leaves out, and of what a target in widths leaves as it is."""
    asked = prune | {"floors": {"layers": 1, "hidden": 8, "intermediate": 8}}
    run = {
        "data": {"train": "a.txt", "sequence_length": 32},
        "train": {"tokens": "20K", "lr": 1e-3},
        "run": {"dir": "r"},
    }
    recipe = Recipe.model_validate({"source": "a/b", "prune": asked} | run)
    said = [line for line in advisories_of(recipe, pruning_plan(recipe, tiny_config("llama-gqa"))) if "floors" in line]
    names = f"prune.floors.{idle}; leave them out"
    assert said == ([f"without effect, since nothing that may fall narrows these widths: {names}"] if idle else [])
