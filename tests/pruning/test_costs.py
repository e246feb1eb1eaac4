"""Costs: exact figures, monotone in every width, feasible shapes under each by brute force."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.latency_fit import never_falling
from efficientllm.models.space import space_of
from efficientllm.pruning.costs import (
    AXIS_TYPES,
    TABLE_AXES,
    Cost,
    KVCache,
    Params,
    TableCost,
    counts,
    shape_at,
)
from efficientllm.pruning.dimensions import PRUNING_TYPES
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Event, Space
from efficientllm.pruning.live import Live
from efficientllm.pruning.selection import Candidate, Ranking, candidates, least_damage
from efficientllm.pruning.shapes import Alignment, Floors
from efficientllm.pruning.widths import Widths

SPACE = space_of(tiny_config("llama-gqa"))  # 2 layers, hidden 40, 4 heads on 2 KV heads, FFN 52
LEAST, MOST = Widths(1, 8, 1, 1, 8), Widths(3, 96, 24, 6, 200)


def table_cost(seed: int = 0, *, small: bool = False) -> TableCost:
    """Random seconds, made monotone, over a grid from LEAST to MOST; over small widths one value in three is as low as
    its neighbour's."""
    grid = ((1, 2, 3), (8, 30, 96), (1, 3, 6), (1, 4), (8, 50, 120, 200))
    if small:
        grid = ((1, 2, 3), (8, 12, 24), (1, 2, 3), (1, 3), (8, 12, 20, 32))
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand([len(levels) for levels in grid], generator=generator, dtype=torch.float64)
    return TableCost(grid, never_falling(values.where(values > 0.33, values.min()) if small else values), "a table")


def cost_named(name: str, space: Space = SPACE, seed: int = 0) -> Cost:
    costs = {"params": Params(space), "flops": FlopsPerToken(space, 64), "kv-cache": KVCache(space.head_dim)}
    return table_cost(seed) if name == "latency" else costs[name]


NAMES = ("params", "flops", "kv-cache", "latency")


def widths_up_to(layers: int, hidden: int, kv: int, queries: int, ffn: int) -> st.SearchStrategy[Widths]:
    least = (1, 8, 1, 1, 8)
    drawn = [st.integers(*ends) for ends in zip(least, (layers, hidden, kv, queries, ffn), strict=True)]
    return st.builds(lambda layers, hidden, kv, queries, ffn: Widths(layers, hidden, kv * queries, kv, ffn), *drawn)


shapes, small = widths_up_to(3, 96, 6, 4, 200), widths_up_to(3, 24, 3, 3, 32)


def test_costs_are_what_a_model_costs() -> None:
    widths = SPACE.widths
    assert KVCache(SPACE.head_dim)(widths) == 2 * 2 * 2 * SPACE.head_dim * 2  # layers, keys and values, heads, bytes
    model = tiny_model("llama-gqa")
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2)
    embedding = 61 * widths.hidden
    attention = 4 * widths.layers * widths.heads * SPACE.head_dim * 16
    assert FlopsPerToken(SPACE, 16)(widths) == 2 * (matrices - embedding) + attention
    assert Params(SPACE)(widths) == model.num_parameters()


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(NAMES), st.sampled_from(PRUNING_TYPES), st.integers(0, 5))
def test_no_cost_falls_when_a_width_grows(widths: Widths, name: str, pruning_type: str, seed: int) -> None:
    cost = cost_named(name, seed=seed)
    if widths.count(pruning_type) > LEAST.count(pruning_type):
        assert cost(widths.after(pruning_type)) <= cost(widths) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=8), st.sampled_from(NAMES))
def test_tensors_of_widths_cost_what_each_costs(several: list[Widths], name: str) -> None:
    cost = cost_named(name)
    records = [each.record() for each in several]
    fields = {name: torch.tensor([record[name] for record in records]) for name in records[0]}
    assert cost(Widths(**fields)).tolist() == [cost(each) for each in several]  # type: ignore[arg-type]


def test_the_table_is_exact_at_its_shapes_and_linear_between() -> None:
    cost = table_cost()
    for index in torch.cartesian_prod(*(torch.arange(len(levels)) for levels in cost.grid)).tolist():
        layers, hidden, kv, queries, ffn = (levels[i] for levels, i in zip(cost.grid, index, strict=True))
        assert cost(Widths(layers, hidden, kv * queries, kv, ffn)) == float(cost.values[tuple(index)])
    low, high = (cost(Widths(1, 8, 1, 1, ffn)) for ffn in (50, 120))
    assert cost(Widths(1, 8, 1, 1, 85)) == pytest.approx((low + high) / 2)
    with pytest.raises(ValueError, match="hidden 97 to 97 lies outside 8 to 96"):
        cost(MOST.changed(hidden=97))


def maximal(cost: Cost, source: Widths, target: float, types: tuple[str, ...], step: int) -> set[tuple[int, ...]]:
    """By brute force: the aligned shapes under the target that no other of them has everywhere as wide or wider."""
    axes = []
    for each in AXIS_TYPES:
        have, multiple = source.count(each), step if each in ("stem", "ffn") else 1
        least = LEAST.count(each) if each in types else have
        axes.append([width for width in range(least, have + 1) if width % multiple == 0 or width == have])
    every = torch.tensor(list(itertools.product(*axes)))
    under = every[torch.as_tensor(cost(shape_at(every.unbind(1)))) <= target]
    wider = (under[:, None] <= under[None]).all(2).sum(1) > 1  # than each, beside itself
    return {tuple(place) for place in under[~wider].tolist()}


def walk_at_random(feasible: FeasibleShapes, now: Widths, types: tuple[str, ...], order: random.Random) -> Widths:
    while not feasible.reached(now):
        allowed = [each for each in types if now.count(each) > 1 and feasible.reachable(now.after(each))]
        assert allowed, f"stuck at {now}"
        now = now.after(order.choice(allowed))
    return now


@settings(max_examples=60, deadline=None)
@given(
    small,
    st.sampled_from(NAMES),
    st.booleans(),
    st.floats(0.3, 0.95),
    st.sampled_from([1, 4, 8]),
    st.sets(st.sampled_from(PRUNING_TYPES), min_size=1),
    st.integers(0, 10**6),
)
def test_every_allowed_path_ends_in_a_maximal_shape(
    source: Widths, name: str, tied: bool, share: float, step: int, chosen: set[str], seed: int
) -> None:
    """Whatever the order of events, cost (tables with flats among them), depth and a milestone before."""
    config = tiny_config("llama-gqa", num_hidden_layers=source.layers, tie_word_embeddings=tied)
    space = Space(space_of(config).params, source, 6)
    cost = table_cost(seed % 5, small=True) if name == "latency" else cost_named(name, space)
    types = tuple(each for each in PRUNING_TYPES if each in chosen and counts(cost, source, each, LEAST))
    order, options = random.Random(seed), {"types": types, "align": Alignment(step, step), "cost": cost}
    whole = cost(source)
    target = int(whole * share) if isinstance(whole, int) else whole * share
    milestone = (whole + target) // 2 if isinstance(whole, int) else (whole + target) / 2
    want = maximal(cost, source, target, types, step)
    floors = Floors(hidden=8, intermediate=8)
    if not want or target >= whole:
        with pytest.raises(ValueError, match="the least that the floors"):
            FeasibleShapes(space, target, floors=floors, **options)
        return
    feasible = FeasibleShapes(space, target, floors=floors, **options)
    assert set(map(tuple, feasible.shapes.tolist())) == want
    assert feasible.sizes.tolist() == sorted((cost(shape_at(each)) for each in want), reverse=True)
    assert tuple(feasible.place(walk_at_random(feasible, source, types, order))) in want
    assert tuple(feasible.place(feasible.balanced())) in want
    above = {each for each in maximal(cost, source, milestone, types, step) if cost(shape_at(each)) > target}
    leads_on = {each for each in above if any(all(a <= b for a, b in zip(end, each, strict=True)) for end in want)}
    if milestone in (target, whole):
        return
    first = FeasibleShapes(space, milestone, floors=floors, **options)
    if not leads_on:
        with pytest.raises(ValueError, match="choose sizes further apart"):
            first.before(feasible)
        return
    first.before(feasible)
    assert set(map(tuple, first.shapes.tolist())) == leads_on
    between = walk_at_random(first, source, types, order)
    assert tuple(feasible.place(between)) in leads_on
    assert tuple(feasible.place(walk_at_random(feasible, between, types, order))) in want


def test_events_are_priced_in_the_run_s_cost() -> None:
    """In whole parameters where nothing else is asked for; an event that saves nothing is never the lightest."""
    live = Live.full(SPACE.widths)
    scores = {each: torch.rand(live.units(each).shape) for each in PRUNING_TYPES}

    def events(cost: Cost | None) -> dict[str, Event]:
        source = (cost or Params(SPACE))(SPACE.widths)
        options = {"types": PRUNING_TYPES, "align": Alignment(), "floors": Floors(hidden=6)}
        feasible = FeasibleShapes(SPACE, source // 2, cost=cost, **options)
        ranking = Ranking(scores, live)
        weighed = candidates(ranking, SPACE.widths, feasible=feasible, types=PRUNING_TYPES)
        return {each.event.type: each.event for each in weighed}

    falling = {name: event for name, event in events(None).items() if event.cost}
    assert falling
    for name, event in falling.items():
        assert event.cost == SPACE.event_cost(name, SPACE.widths)
        assert event.damage == event.saliency / SPACE.event_cost(name, SPACE.widths)
    cached = events(KVCache(SPACE.head_dim))
    assert {name for name, event in cached.items() if event.damage < math.inf} in ({"attention"}, {"depth"})


def flat_at(ffn: int) -> TableCost:
    """Latency that grows with hidden and heads, and with FFN channels below `ffn` only."""
    grid = ((2,), (8, 40), (1, 2), (1, 2), (8, 30, 52))
    places = itertools.product(*grid)
    seconds = [hidden + 10 * kv + 10 * queries + min(each, ffn) for _, hidden, kv, queries, each in places]
    return TableCost(grid, torch.tensor(seconds, dtype=torch.float64).view(1, 2, 2, 2, 3), "a table")


def test_a_flat_stretch_of_a_table_is_priced_by_the_whole_way() -> None:
    """Above 30 FFN channels the table says that a channel saves nothing; from 52 to 8 they save 22 seconds."""
    types = ("attention", "attention_query", "ffn", "stem")
    live = Live.full(SPACE.widths)
    scores = {each: torch.ones(live.units(each).shape) for each in PRUNING_TYPES}
    scores["ffn"] *= 1e-9
    cost, floors = flat_at(30), Floors(hidden=8, intermediate=8)
    target = cost(SPACE.widths) - 22
    feasible = FeasibleShapes(SPACE, target, types=types, align=Alignment(), floors=floors, cost=cost)
    weighed = candidates(Ranking(scores, live), SPACE.widths, feasible=feasible, types=types)
    assert cost(SPACE.widths.after("ffn")) == cost(SPACE.widths)
    ffn = next(each.event for each in weighed if each.event.type == "ffn")
    assert ffn.cost == pytest.approx(22 / 44)
    assert least_damage(weighed) is ffn  # next to no saliency, and so it falls although the table sees no gain yet


def test_where_nothing_is_saved_saliency_chooses() -> None:
    """By KV cache neither FFN nor stem saves a byte: of them the one with less saliency a parameter comes first."""
    units = torch.zeros(2, dtype=torch.int64)
    weighed = [
        Candidate(Event("attention", units, 5.0, 0.0), True, 100),
        Candidate(Event("ffn", units, 1.0, 0.0), True, 100),
        Candidate(Event("stem", units, 1.0, 0.0), True, 50),
    ]
    least = least_damage(weighed)
    assert least is not None
    assert least.type == "ffn"


def test_a_type_counts_where_it_saves_anything_anywhere() -> None:
    """Noise leaves this table flat along the KV heads at the source's own widths, but not at narrower ones."""
    values = torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64).view(1, 2, 2, 1, 1)
    cost = TableCost(((2,), (8, 40), (1, 2), (2,), (52,)), values, "a table")
    least = Widths(2, 8, 2, 1, 52)
    assert cost(SPACE.widths) == cost(SPACE.widths.changed(heads=2, kv_heads=1))
    assert counts(cost, SPACE.widths, "attention", least)
    assert not counts(cost, SPACE.widths, "attention", least.changed(hidden=40))
    assert not counts(cost, SPACE.widths, "ffn", least)


def test_axes_of_the_table_are_widths() -> None:
    assert all(hasattr(SPACE.widths, axis) for axis in TABLE_AXES)
