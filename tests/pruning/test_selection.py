"""Ranking, calibration and the choice between types."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_config
from efficientllm.models.space import space_of
from efficientllm.pruning.calibration import Calibration
from efficientllm.pruning.groups import PRUNING_TYPES, Cut, Live
from efficientllm.pruning.landing import Alignment, Floors, Landing
from efficientllm.pruning.selection import Ranking, candidates, least_damage

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
    event = Cut("attention", torch.tensor([1, 0]))
    ranking.upcoming("attention_query", 1)
    live.remove(event)
    ranking.take(event)
    units, _ = ranking.upcoming("attention_query", 1)
    assert (units[0] >= 0).tolist() == [True, False, False, True]  # rows: layer 0 KV 0, 1; layer 1 KV 0, 1


def test_calibration_changes_the_choice() -> None:
    """FFN looks cheap by its scores; measured, it costs ten times what they say."""
    table = scores()
    live = Live.full(SPACE.widths)
    landing = Landing(
        SPACE, int(SPACE.num_params() * 0.5), types=PRUNING_TYPES, align=Alignment(), floors=Floors(hidden=6)
    )

    def choice(calibration: Calibration | None) -> str:
        weighed = candidates(
            Ranking(table, live),
            SPACE.widths,
            landing=landing,
            calibration=calibration,
            types=PRUNING_TYPES,
        )
        event = least_damage(weighed)
        assert event is not None
        return event.type

    raw = choice(None)
    calibration = Calibration()
    calibration.update(raw, measured=1000.0, predicted=1.0)
    assert choice(calibration) != raw


def test_calibration_averages_and_never_turns_negative() -> None:
    calibration = Calibration(smoothing=0.5)
    assert calibration.ratio("ffn") == 1.0
    calibration.update("ffn", measured=0.2, predicted=1.0)
    calibration.update("ffn", measured=0.4, predicted=1.0)
    assert calibration.ratio("ffn") == pytest.approx((0.5 * 0.2 + 0.4) / 1.5)
    calibration.update("stem", measured=-0.1, predicted=1.0)
    assert calibration.ratio("stem") == 1e-3


def test_ratios_that_have_settled_are_left_alone() -> None:
    calibration = Calibration()
    assert calibration.due("ffn", 100.0, 0.05)
    calibration.update("ffn", 0.2, 1.0, 100.0)
    assert not calibration.due("ffn", 98.0, 0.05)
    assert calibration.due("ffn", 97.0, 0.05)
    calibration.update("ffn", 0.24, 1.0, 97.0)  # moves the ratio by an eighth
    assert not calibration.due("ffn", 80.0, 0.05)
    assert calibration.due("ffn", 77.0, 0.05)
    calibration.update("ffn", 1.0, 1.0, 77.0)
    assert calibration.due("ffn", 74.0, 0.05)


def test_predictions_are_shares_of_a_look() -> None:
    """A look on fewer tokens predicts three times as much for everything: measured increases stay comparable."""
    calibration = Calibration(scale=2.0)
    calibration.update("ffn", 0.5, 0.1)
    calibration.scale = 6.0
    assert 0.3 * calibration.ratio("ffn") == pytest.approx(0.5)
