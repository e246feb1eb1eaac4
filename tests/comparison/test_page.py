"""What the page claims and the picture shows: intervals beside claims, rates at an edge, seeds joined by tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from efficientllm.comparison.page import _verdict, at_edge
from efficientllm.comparison.results import check_same_text
from efficientllm.errors import UsageError
from efficientllm.reporting.comparison_plot import _curve, plot_comparison


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
def test_a_rate_at_the_edge_is_said(lr: float, edge: bool) -> None:
    assert at_edge(arm(0.0, 0.1, lr=lr)) == edge
    assert ("edge of the tried rates" in "\n".join(_verdict({"it": arm(0.0, 0.1, lr=lr)}))) == edge


def test_runs_on_other_text_are_refused() -> None:
    def outcome(corpora: str, windows: int) -> SimpleNamespace:
        summary = {"source": {"corpora": [corpora]}, "result": {"path": "runs/odd/model"}}
        return SimpleNamespace(summary=summary, windows={"losses": [1.0] * windows})

    check_same_text([outcome("books", 3), outcome("books", 3)])  # type: ignore[list-item]
    for other in (outcome("books", 4), outcome("code", 3)):
        with pytest.raises(UsageError, match="runs/odd was trained or measured on other text"):
            check_same_text([outcome("books", 3), other])  # type: ignore[list-item]


def test_seeds_are_joined_at_equal_tokens(tmp_path: Path) -> None:
    """A validation that one seed left out is left out of the mean, and shifts nothing."""
    folders = []
    for name, left_out in (("one", None), ("other", 200)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {
                "step": at // 100,
                "tokens": at,
                "flops": 10 * at,
                "validation_loss": None if at == left_out else 5 - at / 100,
            }
            for at in (100, 200, 300)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    assert _curve(folders[1], "flops") == {100: (1000, 4.0), 300: (3000, 2.0)}
    assert plot_comparison({"loop": folders}, tmp_path / "curves.png", title="two seeds").stat().st_size > 5000
