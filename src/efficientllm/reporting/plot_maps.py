"""Plots of a report that show a run's shape: its widths on the way, and which unit fell when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from efficientllm.pruning.dimensions import DIMENSIONS, of_type
from efficientllm.pruning.history import fallen_at
from efficientllm.reporting.plot_style import FONT_SIZE, count_label, dress
from efficientllm.reporting.run_record import RunRecord
from efficientllm.reporting.tables import EXPERT_LABELS, WIDTH_LABELS

LABELS = WIDTH_LABELS | EXPERT_LABELS


def architecture(runs: Sequence[RunRecord]) -> Figure | None:
    """A bar for each width at the source, on the way (thirds of the events) and at the end, a group a run."""
    shown = [run for run in runs if run.source_widths and run.events]
    if not shown:
        return None
    figure = Figure(figsize=(8.4, 2.6 * len(shown) + 0.4), layout="constrained")
    for axes, run in zip(np.atleast_1d(figure.subplots(len(shown), 1)), shown, strict=True):
        assert run.source_widths is not None
        thirds = (len(run.events) // 3, 2 * len(run.events) // 3, -1)
        stages = [run.source_widths.record(), *(dict(run.events[index]["widths"]) for index in thirds)]
        names = [name for name in LABELS if name in stages[0]]
        for place, stage in enumerate(stages):
            shares = [stage[width] / stages[0][width] for width in names]
            offset = np.arange(len(names)) + 0.2 * (place - 1.5)
            label = ("source", "a third of the events", "two thirds", "end")[place]
            axes.bar(offset, shares, width=0.19, color=str(0.75 - 0.2 * place), edgecolor="#0072B2", label=label)
            for x, share, width in zip(offset, shares, names, strict=True):
                axes.text(x, share, str(stage[width]), ha="center", va="bottom", fontsize=FONT_SIZE - 3, clip_on=True)
        axes.set_xticks(range(len(names)), [LABELS[name] for name in names])
        axes.set_ylim(0, 1.45)
        dress(axes, "", "share of the source's", title=run.name)
        axes.legend(fontsize=FONT_SIZE - 1.5, frameon=False, ncols=4, loc="upper right")
    return figure


def units(runs: Sequence[RunRecord]) -> Figure | None:
    """A map a type and run: rows are what the type lies within, columns its units, colour the time."""
    maps = []
    for run in runs:
        if not run.source_widths or not run.events:
            continue
        try:
            when = fallen_at(run.source_widths, run.events, run.compactions)
        except ValueError as error:
            run.notes.append(f"the map of units is left out: {error}")
            continue
        fallen = {kind: table.numpy() for kind, table in when.items() if table.isfinite().any()}
        maps += [(run, kind, table) for kind, table in fallen.items() if table.shape[1] > 1]
    if not maps:
        return None
    heights = [0.55 + min(2.2, 0.12 * table.shape[0]) for _, _, table in maps]
    figure = Figure(figsize=(8.4, sum(heights) + 0.5 * len(maps)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(maps), 1, height_ratios=heights))
    last = max(float(table[np.isfinite(table)].max()) for _, _, table in maps)
    image = None
    for axes, (run, kind, table) in zip(panels, maps, strict=True):
        shown = np.ma.masked_invalid(table)
        axes.set_facecolor("#9A9A9A")
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="plasma_r", norm=Normalize(0, last))
        axes.set_title(kind if len(runs) == 1 else f"{run.name}: {kind}", fontsize=FONT_SIZE, loc="left")
        within = of_type(kind).within
        axes.set_ylabel(DIMENSIONS[within].label if within else "model", fontsize=FONT_SIZE - 1)
        axes.set_xlabel("unit of the source", fontsize=FONT_SIZE - 1)
        axes.tick_params(labelsize=FONT_SIZE - 2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins="auto", min_n_ticks=1))
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), shrink=0.7, label="tokens when it fell")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(count_label))
    return figure
