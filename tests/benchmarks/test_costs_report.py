"""The statistics of benchmarks/costs.py on made-up runs whose answer is known."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "costs_report.py"
    spec = importlib.util.spec_from_file_location("costs_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(cost: str, seed: int, loss: float, **shares: float) -> dict[str, Any]:
    return {"cost": cost, "share": f"{shares[cost]:.0%}", "seed": seed, "loss": loss, "shares": shares}


def test_isotonic_pools_what_falls_and_keeps_the_rest(report: ModuleType) -> None:
    assert report.isotonic([(0, 1.0), (1, 3.0), (2, 2.0), (3, 4.0)]) == [(0, 1.0), (1.5, 2.5), (3, 4.0)]
    assert report.isotonic([(0, 1.0), (1, 2.0)]) == [(0, 1.0), (1, 2.0)]


def test_a_dominated_run_is_averaged_not_dropped(report: ModuleType) -> None:
    """A run at 50 % that is worse than the one at 40 % pulls the size at that loss up."""
    runs = [row("params", 1, loss, params=share) for share, loss in ((0.8, 4.0), (0.5, 4.6), (0.4, 4.5), (0.2, 5.0))]
    path = report.Path(runs)
    assert path.share("params", 4.55) == pytest.approx(math.log(math.sqrt(0.5 * 0.4)))


def paths(report: ModuleType, factors: dict[int, float]) -> tuple[Any, Any]:
    """Two arms with loss 4 - log(own share); the second pays `factors[seed]` times its share of params."""
    rows = []
    for seed, factor in factors.items():
        for share in (0.8, 0.6, 0.4, 0.2):
            loss = 4.0 - math.log(share)
            rows.append(row("params", seed, loss, params=share, flops=share))
            rows.append(row("flops", seed, loss, flops=share, params=factor * share))
    found = report.paths_of(rows)
    return found["params"], found["flops"]


def test_the_paired_ratio_of_shares_is_found_with_its_interval(report: ModuleType) -> None:
    own, other = paths(report, {1: 1.2, 2: 1.25, 3: 1.3})
    mean, low, high = report.paired(own, other, "params")
    logs = [-math.log(each) for each in (1.2, 1.25, 1.3)]
    assert mean == pytest.approx(sum(logs) / 3)
    assert low < mean < high < 0
    assert report.paired(own, other, "flops")[0] == pytest.approx(0.0)


def test_only_an_interval_without_zero_is_bold(report: ModuleType) -> None:
    clear, unclear = (
        report._cell(report.paired(*paths(report, each), "params"))
        for each in ({1: 1.2, 2: 1.25, 3: 1.3}, {1: 0.9, 2: 1.25, 3: 1.6})
    )
    assert clear.startswith("**-")
    assert not unclear.startswith("**")


def test_arms_without_a_common_loss_are_not_compared(report: ModuleType) -> None:
    rows = [row("params", 1, loss, params=share, flops=1.0) for share, loss in ((0.8, 4.0), (0.5, 4.2))]
    rows += [row("flops", 1, loss, flops=share, params=1.0) for share, loss in ((0.8, 4.3), (0.5, 4.5))]
    found = report.paths_of(rows)
    assert report.paired(found["params"], found["flops"], "params") is None
