"""Learning curves of a comparison: validation loss over tokens and over FLOPs, a line an arm, a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from efficientllm.reporting.journal import read_journal
from efficientllm.reporting.plots import FONT_SIZE, RUN_COLOURS, save_figure
from efficientllm.sizes import format_count

LINES = ("-", (0, (5, 1)), (0, (1, 1)))


def plot_comparison(arms: Mapping[str, Sequence[Path | str]], out: Path | str, *, title: str) -> Path:
    """Draw the run folders of each arm, one a seed, to `out` (.png or .svg) and return `out`.

    A line is the mean over seeds, its band their range. Loss axis: cut at the worst final loss of an arm plus half the
    range of final losses, since early losses of fresh models would flatten the rest.
    """
    figure = Figure(figsize=(9, 9), layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 2, fontweight="bold")
    upper, lower = figure.subplots(2, 1)
    finals = [_draw(upper, arms, "tokens"), _draw(lower, arms, "flops")][0]
    for axes, label in ((upper, "training tokens"), (lower, "training FLOPs")):
        axes.set_xlabel(label, fontsize=FONT_SIZE)
        axes.set_ylabel("validation loss (nats per token)", fontsize=FONT_SIZE)
        axes.grid(True, alpha=0.12)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if finals:
            low, high = min(finals), max(finals)
            room = max(0.5 * (high - low), 0.05)
            axes.set_ylim(low - 0.2 * room, high + room)
        axes.set_xlim(left=0)
    upper.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(round(value))))
    upper.legend(fontsize=FONT_SIZE - 1.5, ncols=2, loc="upper right", framealpha=0.9, edgecolor="none")
    return save_figure(figure, Path(out))


def _draw(axes: Axes, arms: Mapping[str, Sequence[Path | str]], key: str) -> list[float]:
    finals = []
    for index, (name, folders) in enumerate(arms.items()):
        curves = [_curve(Path(folder), key) for folder in folders]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))  # a stopped run may have left one out
        if not shared:
            continue
        table = np.array([[curve[tokens] for tokens in shared] for curve in curves])  # (seeds, points, 2)
        at, losses = table[:, :, 0].mean(axis=0), table[:, :, 1]
        colour, line = RUN_COLOURS[index % len(RUN_COLOURS)], LINES[index // len(RUN_COLOURS) % len(LINES)]
        axes.plot(at, losses.mean(axis=0), color=colour, linestyle=line, marker=".", linewidth=1.5, label=name)
        axes.fill_between(at, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        finals.append(float(losses[:, -1].mean()))
    return finals


def _curve(folder: Path, key: str) -> dict[int, tuple[float, float]]:
    """Tokens -> (tokens or FLOPs, validation loss)."""
    lines = read_journal(folder / "metrics.jsonl")
    return {
        line["tokens"]: (line[key], line["validation_loss"])
        for line in lines
        if line.get("validation_loss") is not None
    }
