"""The grid of rates: when it grows, by how much, and which windows choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from efficientllm.comparison import rates
from efficientllm.comparison.arms import parse_arm
from efficientllm.comparison.rates import next_rate, reported_windows, tuning_loss
from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.work import ArmResult, Work


@pytest.mark.parametrize(
    ("tried", "further"),
    [
        ({1.0: 3.0, 2.0: 2.0, 4.0: 2.5}, None),
        ({1.0: 3.0, 2.0: 2.0, 4.0: 1.5}, 8.0),
        ({1.0: 3.0, 2.0: 2.0, 4.0: None}, None),  # beyond 2 it diverged: tried, and worse
        ({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, 0.5),
        ({1.0: 1.0, 0.5: 0.9, 2.0: 2.0, 4.0: 3.0}, 0.25),
        ({1.0: 9.0, 2.0: 8.0, 4.0: 7.0, 8.0: 6.0, 16.0: 5.0, 32.0: 4.0}, None),  # three beyond are enough
        ({1.0: None, 2.0: None, 4.0: None}, None),
    ],
)
def test_the_grid_grows_while_the_best_lies_at_its_edge(tried: dict[float, float | None], further: float) -> None:
    assert next_rate(tried, [1.0, 2.0, 4.0]) == further


def test_three_values_beyond_each_edge_at_most() -> None:
    grid = [0.0015, 0.003]
    tried: dict[float, float | None] = {lr: -lr for lr in grid}
    while (lr := next_rate(tried, grid)) is not None:
        tried[lr] = -lr
    assert max(tried) == pytest.approx(8 * 0.003)
    assert len(tried) == 5


def test_one_rate_is_meant() -> None:
    assert next_rate({1.0: 2.0}, [1.0]) is None


def test_only_the_first_seed_is_tuned_and_every_arm_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"loop": 0.008, "dense": 0.002}
    ran: list[tuple[str, int, float]] = []

    def run_work(comparison: object, work: Sequence[Work], *rest: object) -> list[Outcome]:
        ran.extend((result.arm.name, seed, lr) for result, seed, lr, _ in work)
        losses = [abs(math.log(lr / best[result.arm.name])) for result, _, lr, _ in work]
        return [Outcome({"result": {"validation_loss": loss}}, {"losses": [loss]}) for loss in losses]

    monkeypatch.setattr(rates, "run_work", run_work)
    train = SimpleNamespace(lr=2e-3, tokens=100)
    comparison = SimpleNamespace(recipe=SimpleNamespace(train=train), seeds=[5, 6], grid=[0.5, 1, 2])
    results = [ArmResult(parse_arm(name)) for name in best]
    rates.tune_and_run(comparison, results, {}, print)  # type: ignore[arg-type]
    assert [result.rate for result in results] == [0.008, 0.002]
    assert sorted(results[0].rates) == [0.001, 0.002, 0.004, 0.008, 0.016]
    assert sorted(results[1].rates) == [0.001, 0.002, 0.004]
    assert [each for each in ran if each[1] == 6] == [("loop", 6, 0.008), ("dense", 6, 0.002)]


def test_rates_are_chosen_on_other_windows_than_arms_are_compared_on() -> None:
    run = Outcome({"result": {"validation_loss": 2.0}}, {"losses": [1.0, 5.0, 2.0, 6.0, 3.0]})
    assert tuning_loss(run) == 2.0
    assert reported_windows(run) == [5.0, 6.0]
    assert reported_windows(Outcome({}, {"losses": [1.0]})) == [1.0]
    diverged = Outcome({"result": {"validation_loss": math.nan}}, {"losses": [math.nan]})
    assert tuning_loss(diverged) is None
