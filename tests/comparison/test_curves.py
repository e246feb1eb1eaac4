"""Learning curves: seeds joined at equal shares of their runs, no arm left out without a word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from efficientllm.reporting import plot_measurements
from efficientllm.reporting.plot_measurements import _curve, _joined, plot_comparison


def folder_of(path: Path, tokens: int, validated: Sequence[int]) -> Path:
    """A run of ten steps whose loss falls from 5 by 0.2 a step, validated after some of them."""
    path.mkdir()
    lines = [
        {
            "step": step,
            "tokens": step * tokens // 10,
            "flops": step * tokens,
            "validation_loss": 5 - 0.2 * step if step in validated else None,
        }
        for step in range(1, 11)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_seeds_of_different_lengths_share_a_curve(tmp_path: Path) -> None:
    """As under a budget of FLOPs, where each seed has its own tokens; a validation left out is interpolated."""
    runs = [folder_of(tmp_path / "one", 1000, (2, 5, 10)), folder_of(tmp_path / "two", 3000, (2, 10))]
    at, losses = _joined([_curve(run, "tokens") for run in runs])
    np.testing.assert_allclose(at, [400, 1000, 2000])
    np.testing.assert_allclose(losses, [[4.6, 4.0, 3.0], [4.6, 4.0, 3.0]])


def test_every_arm_is_in_the_legend_and_the_legend_beside_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(plot_measurements, "save_figure", lambda figure, out: drawn.append(figure) or out)
    whole = [folder_of(tmp_path / "one", 1000, (5, 10)), folder_of(tmp_path / "two", 1100, (5, 10))]
    silent = [folder_of(tmp_path / "three", 1000, ()), whole[0]]
    arms = {"loop": whole, "partly": silent, "never": silent[:1]}
    plot_comparison(arms, tmp_path / "curves.png", title="arms")
    (figure,) = drawn
    assert not any(axes.get_legend() for axes in figure.axes)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "loop"
    assert "partly (without 1 of 2 seeds" in texts[1]
    assert "never (without 1 of 1 seeds" in texts[2]
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2, 2, 0]
