"""Plots of a report that show a run's shape: its widths on the way, and which unit fell when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from efficientllm.pruning.dimensions import DIMENSIONS, of_type
from efficientllm.pruning.history import fallen_at
from efficientllm.reporting.plot_style import counted, panels
from efficientllm.reporting.run_record import RunRecord
from efficientllm.reporting.tables import EXPERT_LABELS, WIDTH_LABELS

LABELS = WIDTH_LABELS | EXPERT_LABELS


def architecture(runs: Sequence[RunRecord]) -> Figure | None:
    """A bar for each width at the source, on the way (thirds of the events) and at the end, a group a run."""
    shown = [run for run in runs if run.source_widths and run.events]
    if not shown:
        return None
    figure, drawn = panels(len(shown), 2.6 * len(shown) + 0.4)
    for axes, run in zip(drawn, shown, strict=True):
        assert run.source_widths is not None
        thirds = (len(run.events) // 3, 2 * len(run.events) // 3, -1)
        stages = [run.source_widths.record(), *(dict(run.events[index]["widths"]) for index in thirds)]
        names = [name for name in LABELS if name in stages[0]]
        for place, label in enumerate(("source", "a third of the events", "two thirds", "end")):
            widths = [stages[place][name] for name in names]
            shares = [width / stages[0][name] for width, name in zip(widths, names, strict=True)]
            offset, grey = np.arange(len(names)) + 0.2 * (place - 1.5), str(0.75 - 0.2 * place)
            bars = axes.bar(offset, shares, width=0.19, color=grey, edgecolor="#0072B2", label=label)
            axes.bar_label(bars, list(map(str, widths)), fontsize=7)
        axes.set_xticks(range(len(names)), [LABELS[name] for name in names])
        axes.set(ylim=(0, 1.45), ylabel="share of the source's", title=run.name)
        axes.legend(ncols=4, loc="upper right")
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
    heights = [0.55 + min(2.2, 0.12 * len(table)) for *_, table in maps]
    figure, drawn = panels(len(maps), sum(heights) + 0.5 * len(maps), height_ratios=heights)
    colours = Normalize(0, max(float(table[np.isfinite(table)].max()) for *_, table in maps))
    for axes, (run, kind, table) in zip(drawn, maps, strict=True):
        within = of_type(kind).within
        axes.set(facecolor="#9A9A9A", title=kind if len(runs) == 1 else f"{run.name}: {kind}")
        axes.imshow(np.ma.masked_invalid(table), aspect="auto", interpolation="nearest", cmap="plasma_r", norm=colours)
        axes.set_ylabel(DIMENSIONS[within].label if within else "model", fontsize=9)
        axes.set_xlabel("unit of the source", fontsize=9)
        axes.grid(False)
        axes.spines.top.set_visible(True)
        axes.tick_params(labelsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins="auto", min_n_ticks=1))
    bar = figure.colorbar(drawn[-1].images[0], ax=drawn, shrink=0.7, label="tokens when it fell")
    counted(bar.ax.yaxis)
    return figure
