"""What all pictures share: colours, series of numbers, dressed axes and legends, a figure as a file or as inline SVG.

Drawn with matplotlib's object interface, which needs no display and leaves pyplot's global state alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from efficientllm.files import write_atomically
from efficientllm.pruning.dimensions import DIMENSIONS
from efficientllm.sizes import format_count

# Okabe and Ito's palette: told apart with any colour vision; line styles tell them apart in grey
_STYLES: tuple[tuple[str, Any], ...] = (
    ("#0072B2", "-"), ("#CC79A7", (0, (5, 1))), ("#D55E00", "-"), ("#7B3FBF", "-"),
    ("#B5651D", (0, (5, 1))), ("#009E73", "-"), ("#8C510A", (0, (1, 1)))
)  # fmt: skip
TYPE_STYLES = {  # of a pruning type: colour, line style, label
    row.type: (*style, f"{row.type} ({row.label})") for row, style in zip(DIMENSIONS.values(), cycle(_STYLES))
}
LOSS_COLOUR = "#000000"
VALIDATION_COLOUR = "#56B4E9"
SIZE_COLOUR = "#E69F00"
PHASE_COLOUR = "#F3F3F3"
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RUN_LINES: tuple[Any, ...] = ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
RUN_MARKERS = ("o", "s", "^", "D")
FONT_SIZE = 10
DOTS_PER_INCH = 130
LINE_OF_LEGEND = 0.21  # inches
ROOM_OF_LEGEND = 90  # characters side by side under a plot


def run_style(index: int) -> tuple[str, Any, str]:
    """Colour, line style and marker of a run: the colours first, and then again in another line."""
    again = index // len(RUN_COLOURS) % len(RUN_LINES)
    return RUN_COLOURS[index % len(RUN_COLOURS)], RUN_LINES[again], RUN_MARKERS[again]


def series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of the records that have a number under `key`; a diverged loss is recorded as null."""
    return columns([(record["tokens"], record[key]) for record in records if record.get(key) is not None])


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """The centred mean over about a fiftieth of the run (at least three steps), cut short at its ends."""
    at = np.arange(len(values))
    reach = len(values) // 100 + 1
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last] - total[first]) / (last - first)


def limit_to(axes: Axes, values: Sequence[float]) -> None:
    """Fits the axis to `values`, so that one spike of the raw loss does not flatten everything else."""
    if len(values):
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def panel(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots()


def dress(axes: Axes, xlabel: str, ylabel: str, *, title: str = "", pad: float = 6) -> None:
    """pad: points between title and panel, where `legend_above` puts its row."""
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZE)
    axes.set_title(title, loc="left", fontsize=FONT_SIZE, pad=pad)
    axes.tick_params(which="both", labelsize=FONT_SIZE - 1)
    axes.grid(True, color="#000000", alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def tokens_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(count_label))
    axes.set_xlim(left=0)


def legend_above(axes: Axes, handles: Sequence[Any]) -> None:
    """A legend in a row between title and panel, where it hides no data."""
    style: dict[str, Any] = {"handlelength": 1.8, "columnspacing": 1.2, "borderaxespad": 0.1, "borderpad": 0.2}
    style |= {
        "ncols": max(len(handles), 1),
        "frameon": False,
        "fontsize": FONT_SIZE - (1.5 if len(handles) < 5 else 2.5),
    }
    legend = axes.legend(handles=list(handles), loc="lower left", bbox_to_anchor=(0.0, 1.0), **style)
    legend.set_in_layout(False)  # a long one must not make the panel narrower


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the axes, for which the figure grows by as much."""
    ncols = max(1, min(len(labels), ROOM_OF_LEGEND // (max(map(len, labels), default=0) + 6)))
    figure.set_figheight(figure.get_figheight() + LINE_OF_LEGEND * -(-len(labels) // ncols))
    style: dict[str, Any] = {"fontsize": FONT_SIZE - 1.5, "frameon": False, "ncols": ncols}
    figure.legend(list(handles), list(labels), loc="outside lower center", **style)


def count_label(value: float, _position: int | None = None) -> str:
    return format_count(round(value))


def save_figure(figure: Figure, out: Path) -> Path:
    """Renders to memory first: a picture is never half-written; the same records give the same bytes."""
    kind = "svg" if out.suffix.lower() == ".svg" else "png"
    content = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "efficientllm"}):
        figure.savefig(content, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
    write_atomically(out, content.getvalue())
    return out


def inline_svg(figure: Figure, name: str) -> str:
    """SVG for an HTML page; ids carry the figure's name, so that figures of a page do not take each other's shapes."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", metadata={"Date": None}, transparent=False)
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
