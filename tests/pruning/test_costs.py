"""Costs: exact figures, monotone in every width, a landing under each, and params as they always were."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.space import space_of
from efficientllm.pruning.costs import TABLE_AXES, Cost, KVCache, Params, TableCost, counts
from efficientllm.pruning.groups import PRUNING_TYPES, Event, Live, Space, Widths
from efficientllm.pruning.landing import Alignment, Floors, Landing
from efficientllm.pruning.monotone import never_falling
from efficientllm.pruning.selection import LEAST_PRICE, Candidate, Ranking, candidates, least_damage

SPACE = space_of(tiny_config("llama-gqa"))  # 2 layers, hidden 40, 4 heads on 2 KV heads, FFN 52
LEAST, MOST = Widths(1, 8, 1, 1, 8), Widths(3, 96, 24, 6, 200)


def table_cost(seed: int = 0) -> TableCost:
    """Random seconds, made monotone, over a grid from LEAST to MOST."""
    grid = ((1, 2, 3), (8, 30, 96), (1, 3, 6), (1, 4), (8, 50, 120, 200))
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand([len(levels) for levels in grid], generator=generator, dtype=torch.float64)
    return TableCost(grid, never_falling(values), "a table")


def cost_named(name: str, space: Space = SPACE, seed: int = 0) -> Cost:
    costs = {"params": Params(space), "flops": FlopsPerToken(space, 64), "kv-cache": KVCache(space.head_dim)}
    return table_cost(seed) if name == "latency" else costs[name]


NAMES = ("params", "flops", "kv-cache", "latency")
shapes = st.builds(
    lambda layers, hidden, kv, queries, ffn: Widths(layers, hidden, kv * queries, kv, ffn),
    st.integers(1, 3),
    st.integers(8, 96),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(8, 200),
)


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


@settings(max_examples=80, deadline=None)
@given(
    shapes.filter(lambda widths: min(widths.hidden, widths.intermediate) >= 16),
    st.sampled_from(NAMES),
    st.floats(0.2, 0.95),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 10**6),
)
def test_every_allowed_path_lands_under_every_cost(
    source: Widths, name: str, share: float, step: int, seed: int
) -> None:
    space = Space(space_of(tiny_config("llama-gqa", num_hidden_layers=source.layers)).params, source, 6)
    cost = cost_named(name, space, seed % 5)
    floors = Floors(hidden=8, intermediate=8)
    types = tuple(each for each in PRUNING_TYPES if counts(cost, source, each, LEAST))
    target = cost(source) * share
    target = int(target) if isinstance(cost(source), int) else target
    try:
        landing = Landing(space, target, types=types, align=Alignment(step, step), floors=floors, cost=cost)
    except ValueError as error:
        assert "the least that the floors" in str(error)  # noqa: PT017
        return
    now, order = source, random.Random(seed)
    assert cost(landing.balanced()) <= target
    while not landing.reached(now):
        allowed = [each for each in types if now.count(each) > 1 and landing.reachable(now.after(each))]
        assert allowed, f"stuck at {now}"
        now = now.after(order.choice(allowed))
    assert cost(now) <= target
    assert cost(now) >= 0.99 * target or cost(now) == landing.lowest
    assert all(now.count(each) == source.count(each) for each in PRUNING_TYPES if each not in types)


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.1, 0.95), st.sampled_from([1, 4, 8]))
def test_params_land_as_they_always_did(source: Widths, share: float, step: int) -> None:
    """Against the affine arithmetic in whole numbers that the search under any cost has replaced."""
    space = Space(space_of(tiny_config("llama-gqa", num_hidden_layers=source.layers)).params, source, 6)
    target = int(space.num_params() * share)
    try:
        floors = Floors(hidden=8, intermediate=8)
        landing = Landing(space, target, types=PRUNING_TYPES, align=Alignment(step, step), floors=floors)
    except ValueError:
        return

    def params(ffn: torch.Tensor) -> torch.Tensor:
        heads = landing.kv * landing.queries
        return space.num_params(Widths(landing.layers, landing.hidden, heads, landing.kv, ffn))  # type: ignore[arg-type]

    base = params(torch.zeros_like(landing.hidden))
    slope = params(torch.ones_like(landing.hidden)) - base
    last = torch.searchsorted(landing.ffn, (target - base) // slope, right=True) - 1
    best = int((base + slope * landing.ffn[last.clamp(min=0)])[last >= 0].max())
    lowest = min(best, int(0.99 * target) + 1)
    assert torch.equal(landing.last, last)
    assert landing.lowest == lowest
    assert torch.equal(landing.first, torch.searchsorted(landing.ffn, -(-(lowest - base).clamp(min=0) // slope)))
    assert landing.gap == 1.0 - best / target
    assert isinstance(landing.target, int)


def test_events_are_priced_in_the_landings_cost() -> None:
    """In whole parameters where nothing else is asked for; an event that saves nothing is never the lightest."""
    live = Live.full(SPACE.widths)
    scores = {each: torch.rand(live.units(each).shape) for each in PRUNING_TYPES}

    def events(cost: Cost | None) -> dict[str, Event]:
        source = (cost or Params(SPACE))(SPACE.widths)
        options = {"types": PRUNING_TYPES, "align": Alignment(), "floors": Floors(hidden=6)}
        landing = Landing(SPACE, source // 2, cost=cost, **options)
        ranking = Ranking(scores, live)
        weighed = candidates(ranking, SPACE.widths, landing=landing, calibration=None, types=PRUNING_TYPES)
        return {each.event.type: each.event for each in weighed}

    for name, event in events(None).items():
        assert type(event.cost) is int
        assert event.cost == SPACE.event_cost(name, SPACE.widths)
        assert event.damage == event.saliency / SPACE.event_cost(name, SPACE.widths)
    cached = events(KVCache(SPACE.head_dim))
    assert {name for name, event in cached.items() if event.damage < math.inf} == {"attention", "depth"}


FLAT_GRID = ((2,), (8, 40), (1, 2), (1, 2), (8, 30, 52))


def flat_at(ffn: int, seconds: float = 1.0) -> TableCost:
    """Latency that grows with hidden and heads, and with FFN channels below `ffn` only."""
    values = [
        seconds * (hidden + 10 * kv + 10 * queries + min(each, ffn))
        for hidden in FLAT_GRID[1]
        for kv in FLAT_GRID[2]
        for queries in FLAT_GRID[3]
        for each in FLAT_GRID[4]
    ]
    return TableCost(FLAT_GRID, torch.tensor(values, dtype=torch.float64).view(1, 2, 2, 2, 3), "a table")


def landing_by(cost: Cost) -> Landing:
    types = ("attention", "attention_query", "ffn", "stem")
    floors = Floors(hidden=8, intermediate=8)
    return Landing(SPACE, 0.6 * cost(SPACE.widths), types=types, align=Alignment(), floors=floors, cost=cost)


def test_a_flat_stretch_of_a_table_keeps_a_small_price() -> None:
    """Above 30 FFN channels the table says that a channel saves nothing, on average it saves 22 / 44 of a second."""
    live = Live.full(SPACE.widths)
    scores = {each: torch.ones(live.units(each).shape) for each in PRUNING_TYPES}
    scores["ffn"] *= 1e-9
    landing = landing_by(flat_at(30))
    weighed = candidates(
        Ranking(scores, live), SPACE.widths, landing=landing, calibration=None, types=landing_types(landing)
    )
    ffn = next(each.event for each in weighed if each.event.type == "ffn")
    assert ffn.cost == pytest.approx(LEAST_PRICE * 22 / 44)
    assert least_damage(weighed) is ffn  # next to no saliency, and so it falls although the table sees no gain


def landing_types(landing: Landing) -> tuple[str, ...]:
    return tuple(each for each in PRUNING_TYPES if landing.mean_saving(each) > 0)


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
