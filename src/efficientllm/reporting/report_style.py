"""How the plots of a report are dressed: a style a run, and legends that lie below the data, one entry a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from efficientllm.reporting.plot_style import FONT_SIZE, RUN_COLOURS, count_label
from efficientllm.reporting.run_record import RunRecord

RUN_LINES: tuple[Any, ...] = ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
RUN_MARKERS = ("o", "s", "^", "D")
LINE_OF_LEGEND = 0.21  # inches
ROOM_OF_LEGEND = 90  # characters side by side under a plot


def run_style(index: int) -> tuple[str, Any, str]:
    """Colour, line style and marker of a run: the colours first, and then again in another line."""
    again = index // len(RUN_COLOURS) % len(RUN_LINES)
    return RUN_COLOURS[index % len(RUN_COLOURS)], RUN_LINES[again], RUN_MARKERS[again]


def panel(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots()


def dress_panel(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZE)
    axes.grid(True, color="#000000", alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def legend(figure: Figure, axes: Axes, named: Sequence[tuple[Any, str]] | None) -> None:
    """named: a line and a name for each of several runs; None: whatever has a label in `axes`.

    Below the axes, for which the figure grows by as much.
    """
    handles, labels = zip(*named, strict=True) if named else axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), ROOM_OF_LEGEND // (max(map(len, labels), default=0) + 6)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + LINE_OF_LEGEND * rows)
    style: dict[str, Any] = {"fontsize": FONT_SIZE - 1.5, "frameon": False, "ncols": columns}
    figure.legend(list(handles), list(labels), loc="outside lower center", **style)


def tokens_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(count_label))
    axes.set_xlim(left=0)


def label_of(runs: Sequence[RunRecord], run: RunRecord, text: str) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"
