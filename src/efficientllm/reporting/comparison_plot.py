"""Learning curves of a comparison: validation loss over tokens and over FLOPs, a line an arm, a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from efficientllm.reporting.journal import read_journal
from efficientllm.reporting.plot_style import (
    FONT_SIZE,
    count_label,
    dress,
    legend_below,
    run_style,
    save_figure,
)

Curve = npt.NDArray[np.float64]


def plot_comparison(arms: Mapping[str, Sequence[Path | str]], out: Path | str, *, title: str) -> Path:
    """Draw the run folders of each arm, one a seed, to `out` (.png or .svg) and return `out`.

    A line is the mean over seeds, its band their range, both at equal shares of the runs: under a budget of FLOPs the
    seeds of an arm have different tokens. An arm without a curve is named in the legend all the same. Loss axis: cut at
    the worst final loss of an arm plus half the range of final losses, since early losses of fresh models would flatten
    the rest.
    """
    figure = Figure(figsize=(9, 9), layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 2, fontweight="bold")
    upper, lower = figure.subplots(2, 1)
    finals = [_draw(upper, arms, "tokens"), _draw(lower, arms, "flops")][0]
    for axes, label in ((upper, "training tokens"), (lower, "training FLOPs")):
        dress(axes, label, "validation loss (nats per token)")
        if finals:
            low, high = min(finals), max(finals)
            room = max(0.5 * (high - low), 0.05)
            axes.set_ylim(low - 0.2 * room, high + room)
        axes.set_xlim(left=0)
    upper.xaxis.set_major_formatter(FuncFormatter(count_label))
    legend_below(figure, *upper.get_legend_handles_labels())
    return save_figure(figure, Path(out))


def _draw(axes: Axes, arms: Mapping[str, Sequence[Path | str]], key: str) -> list[float]:
    finals = []
    for index, (name, folders) in enumerate(arms.items()):
        colour, line, _ = run_style(index)
        curves = [curve for folder in folders if len(curve := _curve(Path(folder), key))]
        missing = len(folders) - len(curves)
        label = name if not missing else f"{name} (without {missing} of {len(folders)} seeds: never validated)"
        at, losses = _joined(curves)
        axes.plot(at, losses.mean(axis=0), color=colour, linestyle=line, marker=".", markersize=4, lw=1.5, label=label)
        axes.fill_between(at, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        if curves:
            finals.append(float(losses[:, -1].mean()))
    return finals


def _joined(curves: Sequence[Curve]) -> tuple[Curve, Curve]:
    """Mean position (points,) and losses (curves, points) of several curves at equal shares of their runs.

    A curve that has no point at a share which another has (an interrupted run may have left one out) is interpolated.
    """
    if not curves:
        return np.empty(0), np.empty((1, 0))
    start = max(curve[0, 0] for curve in curves)
    shares = np.unique(np.concatenate([curve[:, 0] for curve in curves]).round(2))  # no two a step apart
    shares = shares[shares >= start - 5e-3]
    table = np.array([[np.interp(shares, curve[:, 0], curve[:, column]) for column in (1, 2)] for curve in curves])
    return table[:, 0].mean(axis=0), table[:, 1]


def _curve(folder: Path, key: str) -> Curve:
    """Rows of (share of the run, tokens or FLOPs, validation loss)."""
    lines = read_journal(folder / "metrics.jsonl")
    return np.array(
        [
            (line["tokens"] / lines[-1]["tokens"], line[key], line["validation_loss"])
            for line in lines
            if line.get("validation_loss") is not None
        ]
    )
