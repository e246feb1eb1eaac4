"""Ranking, and the choice between types."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_config
from efficientllm.models.space import space_of
from efficientllm.pruning.dimensions import PRUNING_TYPES
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Removal, Space
from efficientllm.pruning.live import Live
from efficientllm.pruning.selection import Ranking, least_damaging
from efficientllm.pruning.shapes import Alignment, Floors
from efficientllm.pruning.widths import Widths

SPACE = space_of(tiny_config("llama-gqa"))  # 2 layers, hidden 40, 4 heads on 2 KV heads, FFN 52


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    live = Live.full(SPACE.widths)
    return {each: torch.rand(live.units(each).shape, generator=generator) for each in PRUNING_TYPES}


def test_each_row_gives_its_own_least_salient_unit() -> None:
    table = scores()
    units, saliency = Ranking(table, Live.full(SPACE.widths)).upcoming("ffn", 3)
    want = table["ffn"].sort(dim=1)
    assert torch.equal(units, want.indices[:, :3].T)
    assert saliency == pytest.approx(float(want.values[:, :3].sum()))


def test_ties_go_to_the_lower_unit_and_the_first_type() -> None:
    even = {name: torch.ones_like(table) for name, table in scores().items()}
    live = Live.full(SPACE.widths)
    assert Ranking(even, live).upcoming("stem", 4)[0].flatten().tolist() == [0, 1, 2, 3]


def test_query_heads_of_a_dead_kv_head_are_out() -> None:
    live = Live.full(SPACE.widths)
    ranking = Ranking(scores(), live)
    event = Removal("attention", torch.tensor([1, 0]))
    ranking.upcoming("attention_query", 1)
    live.remove(event)
    ranking.take(event)
    units, _ = ranking.upcoming("attention_query", 1)
    assert (units[0] >= 0).tolist() == [True, False, False, True]  # rows: layer 0 KV 0, 1; layer 1 KV 0, 1


def head_for(
    space: Space, target: float, damage: dict[str, float], *, align: Alignment, widths: Widths | None = None
) -> Widths:
    """The shape that a run heads for whose events have these damages a parameter, at any width."""
    live, now = Live.full(widths or space.widths), widths or space.widths
    evenly = {}
    for name in PRUNING_TYPES:
        rows, nats = len(live.units(name)), damage.get(name, 1.0) * space.event_cost(name, now)
        evenly[name] = torch.full(live.units(name).shape, nats / rows, dtype=torch.float64)
    types = ("attention", "attention_query", "ffn", "stem")
    feasible = FeasibleShapes(space, target, types=types, align=align, floors=Floors())
    return least_damaging(Ranking(evenly, live), now, feasible=feasible, types=types)


def smollm2() -> Space:
    """SmolLM2-135M: 30 layers, hidden 576, 9 heads on 3 KV heads of 64, FFN 1536, tied."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    more = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True}
    return space_of(tiny_config("llama-gqa", vocab_size=49152, **heads, **more))


def test_damage_chooses_the_shape_where_alignment_once_did() -> None:
    """With the damages measured on it SmolLM2 gives FFN channels alone, although that ends 1.2 % under the target."""
    space = smollm2()
    damage = {"ffn": 1.7e-8, "stem": 7e-8, "attention": 5e-8, "attention_query": 2e-7}
    align = Alignment.automatic(space.widths)
    target = int(0.9 * space.num_params())
    assert head_for(space, target, damage, align=align) == space.widths.changed(intermediate=1248)
    assert space.num_params(space.widths.changed(intermediate=1280)) > target
    assert head_for(space, target, damage | {"stem": 1e-9}, align=align).intermediate == 1536


def test_what_goes_unused_has_to_be_paid_for() -> None:
    """Two FFN channels suffice. One whole KV head would be cheaper a parameter, but far more falls than has to."""
    space = SPACE
    target = space.num_params() - space.event_cost("ffn", space.widths, 2)
    align = Alignment(40, 1)
    head, channels = (space.event_cost(name, space.widths, n) for name, n in (("attention", 1), ("ffn", 2)))
    assert head > 2 * channels
    cheaper = {"ffn": 1.0, "stem": 9.0, "attention": 0.9, "attention_query": 9.0}
    assert head_for(space, target, cheaper, align=align) == space.widths.changed(intermediate=50)
    cheapest = cheaper | {"attention": 0.9 * channels / head}
    assert head_for(space, target, cheapest, align=align) == space.widths.after("attention")


def test_a_width_under_way_counts_for_what_is_left_of_its_way() -> None:
    """From 52 FFN channels the way to 48 costs more than four residual channels do, from 49 it costs less."""
    source, align = SPACE.widths, Alignment(4, 4)
    damage = {"ffn": 1.0, "stem": 0.2, "attention": 99.0, "attention_query": 99.0}
    under_way = source.changed(intermediate=49)
    target = SPACE.num_params(source.changed(intermediate=48))
    assert head_for(SPACE, target, damage, align=align).intermediate == 52
    assert head_for(SPACE, target, damage, align=align, widths=under_way) == source.changed(intermediate=48)


def test_what_falls_with_a_layer_falls_once() -> None:
    """Half of the layers take half of every FFN event with them."""
    live = Live.full(SPACE.widths)
    table = {name: torch.ones(live.units(name).shape, dtype=torch.float64) for name in PRUNING_TYPES}
    table["depth"] *= 10.0
    goals = [Widths(1, 40, 4, 2, 44), Widths(2, 40, 4, 2, 38)]  # 10 + 8 nats, 2 * 14 nats
    feasible = FeasibleShapes(SPACE, SPACE.num_params() // 2, types=PRUNING_TYPES, align=Alignment(), floors=Floors())
    feasible.shapes = torch.tensor([feasible.place(each) for each in goals])
    options = {"feasible": feasible, "types": PRUNING_TYPES}
    assert least_damaging(Ranking(table, live), SPACE.widths, **options) == goals[0]
    table["depth"] *= 2.1  # 21 + 8
    assert least_damaging(Ranking(table, live), SPACE.widths, **options) == goals[1]


def test_ties_go_to_the_larger_shape() -> None:
    live = Live.full(SPACE.widths)
    nothing = {name: torch.zeros(live.units(name).shape) for name in PRUNING_TYPES}
    feasible = FeasibleShapes(
        SPACE, SPACE.num_params() // 2, types=PRUNING_TYPES, align=Alignment(4, 4), floors=Floors()
    )
    goal = least_damaging(Ranking(nothing, live), SPACE.widths, feasible=feasible, types=PRUNING_TYPES)
    assert SPACE.num_params(goal) == feasible.sizes.max()
