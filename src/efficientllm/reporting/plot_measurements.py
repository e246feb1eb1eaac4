"""Pictures of what is measured beside a run: the arms of a comparison, and scores against true loss increases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from efficientllm.reporting.journal import read_journal
from efficientllm.reporting.plot_style import TYPE_STYLES, counted, legend_below, run_style, save_figure, styled

Curve = npt.NDArray[np.float64]
COLUMNS = 4


@styled()
def plot_comparison(arms: Mapping[str, Sequence[Path | str]], out: Path | str, *, title: str) -> Path:
    """Validation loss over tokens and over FLOPs of each arm's run folders, one a seed, to `out` (.png or .svg), which
    is returned.

    A line is the mean over seeds, its band their range, both at equal shares of the runs: under a budget of FLOPs the
    seeds of an arm have different tokens. An arm without a curve is named in the legend all the same. Loss axis: cut at
    the worst final loss of an arm plus half the range of final losses, since early losses of fresh models would flatten
    the rest.
    """
    figure = Figure(figsize=(9, 9))
    figure.suptitle(title, fontsize=12)
    upper, lower = figure.subplots(2, 1)
    for axes, key in ((upper, "tokens"), (lower, "flops")):
        finals = _draw(axes, arms, key)
        if finals:
            low, high = min(finals), max(finals)
            room = max(0.5 * (high - low), 0.05)
            axes.set_ylim(low - 0.2 * room, high + room)
        axes.set_xlim(left=0)
        axes.set_ylabel("validation loss (nats per token)")
    upper.set_xlabel("training tokens")
    lower.set_xlabel("training FLOPs")
    counted(upper.xaxis)
    legend_below(figure)
    return save_figure(figure, Path(out))


def _draw(axes: Axes, arms: Mapping[str, Sequence[Path | str]], key: str) -> list[float]:
    """Final losses of the arms that have one."""
    finals = []
    for index, (name, folders) in enumerate(arms.items()):
        colour, line, _ = run_style(index)
        curves = [curve for folder in folders if len(curve := _curve(Path(folder), key))]
        missing = len(folders) - len(curves)
        label = name if not missing else f"{name} (without {missing} of {len(folders)} seeds: never validated)"
        at, losses = _joined(curves)
        axes.plot(at, losses.mean(axis=0), color=colour, linestyle=line, marker=".", markersize=4, label=label)
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
    seen = [line for line in lines if line.get("validation_loss") is not None]
    return np.array([(line["tokens"] / lines[-1]["tokens"], line[key], line["validation_loss"]) for line in seen])


@styled()
def plot_probe(units: Sequence[Mapping[str, Any]], criteria: Sequence[str], out: Path) -> Path:
    """Scores against true loss increases, a panel a criterion; returns `out`.

    units: "type", "increase" (nats) and "scores" by criterion. Logarithmic; units whose removal helps are left out.
    Perfect would be one straight line through all colours.
    """
    rows = math.ceil(len(criteria) / COLUMNS)
    figure = Figure(figsize=(3.0 * COLUMNS, 2.8 * rows))
    for place, name in enumerate(criteria):
        axes = figure.add_subplot(rows, COLUMNS, place + 1, xscale="log", yscale="log", xlabel="score", title=name)
        for kind, (colour, _, label) in TYPE_STYLES.items():
            pairs = [(unit["scores"][name], unit["increase"]) for unit in units if unit["type"] == kind]
            pairs = [pair for pair in pairs if min(pair) > 0.0]
            if pairs:
                axes.plot(*zip(*pairs, strict=True), "o", color=colour, markersize=3.5, alpha=0.75, label=label)
        if place % COLUMNS == 0:
            axes.set_ylabel("true loss increase, nats")
        axes.tick_params(which="both", labelsize=7)
    legend_below(figure)
    return save_figure(figure, out)
