"""Whatever order of allowed events: the run ends aligned, maximal under the target, above every floor."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config
from efficientllm.models.space import space_of
from efficientllm.pruning.costs import shape_at
from efficientllm.pruning.dimensions import PRUNING_TYPES
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import ParamSpec, Space
from efficientllm.pruning.shapes import Alignment, Floors
from efficientllm.pruning.widths import Widths


def space_with(widths: Widths, head_dim: int = 8, vocabulary: int = 100) -> Space:
    template = space_of(tiny_config("llama-gqa"))
    params = [
        ParamSpec(spec.name, (vocabulary, *spec.axes[1:]) if isinstance(spec.axes[0], int) else spec.axes, spec.layer)
        for spec in template.params
    ]
    return Space(tuple(params), widths, head_dim)


widths = st.builds(
    lambda hidden, kv, queries, ffn: Widths(2, hidden, kv * queries, kv, ffn),
    st.integers(16, 200),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(40, 400),
)


@settings(max_examples=60, deadline=None)
@given(widths, st.floats(0.15, 0.95), st.sampled_from([1, 4, 8]), st.integers(0, 10**6))
def test_every_allowed_path_lands(source: Widths, share: float, step: int, seed: int) -> None:
    space = space_with(source)
    target = int(space.num_params() * share)

    def shapes_at(goal: int) -> FeasibleShapes:
        floors = Floors(hidden=8, intermediate=32)
        return FeasibleShapes(space, goal, types=PRUNING_TYPES, align=Alignment(step, step), floors=floors)

    if target < space.num_params(Widths(1, 8, 1, 1, 32)):
        with pytest.raises(ValueError, match="aim higher"):
            shapes_at(target)
        return
    feasible = shapes_at(target)
    order = random.Random(seed)
    now = source
    while not feasible.reached(now):
        allowed = [each for each in PRUNING_TYPES if now.count(each) > 1 and feasible.reachable(now.after(each))]
        assert allowed, f"stuck at {now}"
        now = now.after(order.choice(allowed))
    parameters = space.num_params(now)
    assert parameters <= feasible.target
    for name in ("hidden", "intermediate"):
        width, have = getattr(now, name), getattr(source, name)
        next_width = min(width // step * step + step, have)
        assert width == have or space.num_params(now.changed(**{name: next_width})) > target
    assert now.hidden % step == 0 or now.hidden == source.hidden
    assert now.intermediate % step == 0 or now.intermediate == source.intermediate
    assert now.hidden >= 8
    assert now.intermediate >= 32
    assert now.heads % now.kv_heads == 0


def test_widths_as_target_are_met_exactly() -> None:
    source = Widths(2, 64, 8, 4, 100)
    goal = Widths(2, 50, 4, 2, 77)
    feasible = FeasibleShapes(
        space_with(source), goal, types=PRUNING_TYPES, align=Alignment(8, 8), floors=Floors(hidden=8)
    )
    now = source
    while not feasible.reached(now):
        now = now.after(next(each for each in PRUNING_TYPES if feasible.reachable(now.after(each))))
    assert now == goal


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (10**9, "is not below the source's"),
        (50, "the least that the floors and the pruning types allow; aim higher"),
        (Widths(2, 64, 8, 4, 200), "intermediate 200 is above the source's 100"),
        (Widths(2, 64, 8, 4, 20), "below its floor of 32"),
        (Widths(2, 64, 8, 4, 100), "nothing to prune"),
    ],
)
def test_targets_that_cannot_be_had(target: int | Widths, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeasibleShapes(
            space_with(Widths(2, 64, 8, 4, 100)),
            target,
            types=PRUNING_TYPES,
            align=Alignment(),
            floors=Floors(hidden=8, intermediate=32),
        )


@pytest.mark.parametrize(("family", "share"), [("gemma3-gqa", 0.6), ("gemma2-gqa-tied", 0.8)])
def test_shapes_that_the_family_takes_are_all_open_that_are_maximal(family: str, share: float) -> None:
    space = space_of(
        tiny_config(family, hidden_size=24, intermediate_size=12, num_attention_heads=6, num_hidden_layers=1)
    )
    goal, types = int(space.num_params() * share), ("attention", "attention_query", "ffn", "stem")
    feasible = FeasibleShapes(space, goal, types=types, align=Alignment(), floors=Floors(hidden=4))
    all_shapes = [
        Widths(1, hidden, kv * queries, kv, ffn)
        for hidden in range(4, 25) for kv in (1, 2) for queries in (1, 2, 3) for ffn in range(1, 13)
    ]  # fmt: skip
    fit = [each for each in all_shapes if each.hidden % each.heads == 0 and space.num_params(each) <= goal]

    def inside(one: Widths, other: Widths) -> bool:
        return one != other and all(one[name] <= other[name] for name in one.counts())

    maximal = {each for each in fit if not any(inside(each, other) for other in fit)}
    assert {shape_at(shape) for shape in feasible.shapes.tolist()} == maximal
    with pytest.raises(ValueError, match="target hidden 23 is not a multiple of its 6 heads, as this family needs"):
        FeasibleShapes(space, space.widths.changed(hidden=23), types=types, align=Alignment(), floors=Floors())


def test_a_type_left_out_stays_as_it_is() -> None:
    space = space_with(Widths(2, 64, 8, 4, 100))
    with pytest.raises(ValueError, match="needs pruning type 'stem'"):
        FeasibleShapes(space, Widths(2, 32, 8, 4, 100), types=("ffn",), align=Alignment(), floors=Floors(hidden=8))
    feasible = FeasibleShapes(
        space, int(space.num_params() * 0.8), types=("ffn",), align=Alignment(), floors=Floors(hidden=8)
    )
    assert not feasible.reachable(space.widths.after("stem"))
    assert feasible.reachable(space.widths.after("ffn"))


def test_automatic_alignment_keeps_enough_steps() -> None:
    assert Alignment.automatic(Widths(24, 2048, 32, 32, 8192)) == Alignment(64, 128)
    assert Alignment.automatic(Widths(32, 960, 15, 5, 2560)) == Alignment(16, 64)
    assert Alignment.automatic(Widths(4, 192, 6, 6, 512)) == Alignment(4, 16)
    assert Alignment.automatic(Widths(2, 40, 4, 2, 52)) == Alignment(1, 1)
