"""Scores against true loss increases, one panel a criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from efficientllm.reporting.plot_style import FONT_SIZE, TYPE_STYLES, dress, save_figure

COLUMNS = 4


def plot_probe(units: Sequence[Mapping[str, Any]], criteria: Sequence[str], out: Path) -> Path:
    """units: "type", "increase" (nats) and "scores" by criterion. Logarithmic; units whose removal helps are left out.

    Perfect would be one straight line through all colours.
    """
    rows = math.ceil(len(criteria) / COLUMNS)
    figure = Figure(figsize=(3.0 * COLUMNS, 2.8 * rows), layout="constrained")
    for place, name in enumerate(criteria):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        for pruning_type, (colour, _, label) in TYPE_STYLES.items():
            points = [
                (unit["scores"][name], unit["increase"])
                for unit in units
                if unit["type"] == pruning_type and unit["increase"] > 0.0 and unit["scores"][name] > 0.0
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=3.5, alpha=0.75, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        dress(axes, "score", "" if place % COLUMNS else "true loss increase, nats", title=name)
        axes.tick_params(which="both", labelsize=FONT_SIZE - 3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=FONT_SIZE)
    return save_figure(figure, out)
