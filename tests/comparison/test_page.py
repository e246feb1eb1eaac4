"""What the page claims: intervals beside claims, rates at an edge, budgets that were not met."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from efficientllm.comparison.page import _rates, _table, _verdict, at_edge
from efficientllm.comparison.results import check_same_text
from efficientllm.errors import UsageError


def arm(mean: float, half: float, *, over: str = "seeds", lr: float = 2e-3) -> dict[str, object]:
    low, high = mean - half, mean + half
    difference = {"mean": mean, "low": low, "high": high, "over": over, "resolved": low > 0 or high < 0}
    return {"difference": difference, "lr": lr, "losses_by_lr": {"0.001": 3.0, "0.002": 2.0, "0.004": 2.5}}


def test_every_claim_has_its_interval_and_its_basis() -> None:
    lines = list(_verdict({"good": arm(-0.2, 0.1), "bad": arm(0.3, 0.1, over="windows"), "same": arm(0.01, 0.1)}))
    assert lines[0] == "* Better than the loop: `good` **-0.2000 (-0.3000 to -0.1000)**."
    assert "`bad` **+0.3000 (+0.2000 to +0.4000)**, over windows of one seed" in lines[1]
    assert "`same` +0.0100 (-0.0900 to +0.1100)" in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize(("lr", "edge"), [(1e-3, True), (2e-3, False), (4e-3, True)])
def test_a_rate_at_the_edge_is_said_in_the_claim(lr: float, edge: bool) -> None:
    assert at_edge(arm(0.0, 0.1, lr=lr)) == edge
    (line,) = _verdict({"it": arm(0.0, 0.1, lr=lr)})
    assert ("; `it` at the edge of the tried rates" in line) == edge


def test_a_loop_at_the_edge_weakens_every_claim() -> None:
    loop = arm(0.0, 0.1, lr=4e-3) | {"difference": None}
    lines = list(_verdict({"loop": loop, "it": arm(0.3, 0.1), "that": arm(0.3, 0.1, lr=1e-3)}))
    assert "; `loop` at the edge" in lines[0]
    assert "; `that` and `loop` at the edge" in lines[1]


def test_sensitivity_to_the_rate_is_a_table() -> None:
    failed = arm(0.0, 0.1) | {"losses_by_lr": {"0.002": 2.5, "0.008": None}}
    lines = list(_rates({"loop": arm(0.0, 0.1), "it": failed}))
    assert lines[0] == "| arm | 0.001 | 0.002 | 0.004 | 0.008 |"
    assert lines[2:] == ["| loop | 3.0000 | **2.0000** | 2.5000 | - |", "| it | - | **2.5000** | - | failed |"]


@pytest.mark.parametrize("shares", [(None, None), (0.99, 1.39)])
def test_what_was_spent_of_a_budget_is_a_column(shares: tuple[float | None, float | None]) -> None:
    names = ("loss", "bits_per_byte", "perplexity", "flops", "tokens")
    run = {"parameters": 10, "seconds": 1.0, "peak_memory_bytes": 2**20}
    runs = {seed: run | {"budget_spent": share} for seed, share in enumerate(shares)}
    figures = {"lr": 2e-3, "spread": None, "difference": None, "mean": dict.fromkeys(names, 1.0), "runs": runs}
    header, _, row = _table({"it": figures})
    assert ("| FLOPs / budget |" in header) == ("| 0.99 to 1.39 |" in row) == (shares[0] is not None)


def test_runs_on_other_text_are_refused() -> None:
    def outcome(corpora: str, windows: int) -> SimpleNamespace:
        summary = {"source": {"corpora": [corpora]}, "result": {"path": "runs/odd/model"}}
        return SimpleNamespace(summary=summary, windows={"losses": [1.0] * windows})

    check_same_text([outcome("books", 3), outcome("books", 3)])  # type: ignore[list-item]
    for other in (outcome("books", 4), outcome("code", 3)):
        with pytest.raises(UsageError, match="runs/odd was trained or measured on other text"):
            check_same_text([outcome("books", 3), other])  # type: ignore[list-item]
