"""What `probe` measures is true, leaves no trace, and comes out as a table, a file and a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import World, tiny_model
from efficientllm.cli import main
from efficientllm.evaluation.probe import (
    Sample,
    criteria_scores,
    judge,
    loss_increases,
    rank_correlation,
    removed,
    sample_units,
)
from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA
from efficientllm.pruning.groups import PRUNING_TYPES
from efficientllm.training.gradient import Precision
from reference.groups_fp64 import group_masks

CPU = Precision("cpu", bf16=False)
IDS = torch.randint(0, 61, (6, 20), generator=torch.Generator().manual_seed(3))


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [5, 4, 3, -2]) == pytest.approx(-1.0)
    # With a tie: ranks 1.5, 1.5, 3 against 1, 3, 2; Pearson's of those by hand is 0.
    assert rank_correlation([7, 7, 9], [1, 3, 2]) == pytest.approx(0.0)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


@pytest.mark.parametrize("pruning_type", PRUNING_TYPES)
def test_one_unit_is_removed_and_every_bit_comes_back(family: str, pruning_type: str) -> None:
    model = tiny_model(family)
    space, params = space_of(model.config), dict(model.named_parameters())
    if pruning_type not in {each for each, _, _ in sample_units(space, PRUNING_TYPES, 1, 0)}:
        pytest.skip("one query head a KV head")
    before = {name: weight.detach().clone() for name, weight in params.items()}
    shapes = {name: tuple(weight.shape) for name, weight in params.items()}
    masks = group_masks(shapes, space.widths, space.head_dim, pruning_type, 0, 1)
    with removed(space, params, pruning_type, 0, 1):
        for name, weight in params.items():
            assert torch.equal(weight.detach(), before[name].masked_fill(masks[name], 0.0)), name
    assert all(torch.equal(weight.detach(), before[name]) for name, weight in params.items())


def test_scores_and_verdict() -> None:
    model = tiny_model("llama-gqa").eval()
    space = space_of(model.config)
    scores = criteria_scores(model, IDS.split(3), 2, CPU, lambda _: None)
    assert scores.keys() == CRITERIA.keys()
    units = sample_units(space, PRUNING_TYPES, 6, seed=1)
    assert units == sample_units(space, PRUNING_TYPES, 6, seed=1)
    samples = loss_increases(model, units, IDS, 4, CPU, lambda _: None)
    assert [(each.type, each.row, each.unit) for each in samples] == units
    assert not any(weight.grad is not None for weight in model.parameters())
    perfect = {"truth": {kind: torch.zeros_like(score) for kind, score in scores["fisher"].items()}}
    for sample in samples:
        perfect["truth"][sample.type][sample.row, sample.unit] = 2.0 * sample.increase
    verdict = judge(samples, perfect)["truth"]["all"]
    assert verdict["rank_correlation"] == pytest.approx(1.0)
    harmful = [sample for sample in samples if sample.increase > 0.0]  # over all, chance may make the sum negative
    assert len(harmful) > 5
    assert judge(harmful, perfect)["truth"]["all"]["scale"] == pytest.approx(2.0)
    assert judge([Sample("ffn", 0, 0, 1.0), Sample("ffn", 0, 1, 2.0)], scores)["random"]["ffn"]["units"] == 2


def test_the_scale_is_the_sum_of_scores_over_the_sum_of_true_increases() -> None:
    """Neither the median nor the mean of ratios, which here are 4 and 7; units whose removal helps count too."""
    samples = [Sample("ffn", 0, unit, increase) for unit, increase in enumerate([1.0, 0.5, 2.5])]
    samples += [Sample("stem", 0, 0, -1.0), Sample("stem", 0, 1, 4.0)]
    scores = {"x": {"ffn": torch.tensor([[4.0, 8.0, 2.5, 99.0]]), "stem": torch.tensor([[0.5, 1.0]])}}
    verdict = judge(samples, scores)["x"]
    assert verdict["ffn"]["scale"] == pytest.approx(14.5 / 4.0)
    assert verdict["stem"]["scale"] == pytest.approx(1.5 / 3.0)
    assert verdict["all"]["scale"] == pytest.approx(16.0 / 7.0)
    assert math.isnan(judge([Sample("stem", 0, 0, -1.0)], scores)["x"]["stem"]["scale"])


def test_the_command(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "probe"
    arguments = ["probe", str(world.folder / "source"), "--data", str(world.folder / "train.jsonl"), "--out", str(out)]
    arguments += ["--units", "5", "--batches", "2", "--rows", "2", "--sequence-length", "32", "--depth"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    table = capsys.readouterr().out
    result = json.loads((out / "probe.json").read_text())
    assert result["criteria"].keys() == CRITERIA.keys()
    assert all(name in table for name in CRITERIA)
    assert {unit["type"] for unit in result["units"]} == set(PRUNING_TYPES)
    assert (out / "probe.png").stat().st_size > 20_000
    with pytest.raises(SystemExit) as stop:
        main([*arguments[:-1], "--sequence-length", "512"])
    assert stop.value.code == 2
    assert "more than the model's 64 positions" in capsys.readouterr().err
