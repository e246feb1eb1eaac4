"""What all pictures share: style, colours, series of numbers, legends, a figure as a file or as inline SVG.

Drawn with matplotlib's object interface, which needs no display and leaves pyplot's global state alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from efficientllm.files import write_atomically
from efficientllm.pruning.dimensions import DIMENSIONS
from efficientllm.sizes import format_count

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

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
WIDTH = 8.4  # inches
LINE_OF_LEGEND = 0.21  # inches
ROOM_OF_ROW = 150  # characters above a panel of RUN/run.png
ROOM_OF_LEGEND = 90  # characters side by side under a plot
_RC: dict[Any, Any] = {
    "figure.constrained_layout.use": True, "figure.titlesize": 13, "figure.titleweight": "bold", "savefig.dpi": 130,
    "axes.titlesize": 10, "axes.labelsize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#000000", "grid.alpha": 0.12, "grid.linewidth": 0.7,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 8.5, "legend.frameon": False,
    "svg.hashsalt": "efficientllm",
}  # fmt: skip


@contextmanager
def styled(**more: Any) -> Iterator[None]:
    """While figures are made, and once more while they are rendered: matplotlib reads its settings in both."""
    with matplotlib.rc_context(_RC | more):
        yield


def run_style(index: int) -> tuple[str, Any, str]:
    """Colour, line style and marker of a run: the colours first, and then again in another line."""
    again = index // len(RUN_COLOURS) % len(RUN_LINES)
    return RUN_COLOURS[index % len(RUN_COLOURS)], RUN_LINES[again], RUN_MARKERS[again]


def series(records: Iterable[Mapping[str, Any]], key: str) -> Points:
    """(tokens, values) of the records that have a number under `key`; a diverged loss is recorded as null."""
    return points((record["tokens"], record.get(key)) for record in records)


def points(pairs: Iterable[tuple[float, float | None]]) -> Points:
    """The pairs that have a value, as two arrays."""
    table = np.asarray([pair for pair in pairs if pair[1] is not None], dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def panels(count: int = 1, height: float = 3.4, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, one above another. height: inches of the figure; more: for Figure.subplots."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, list(figure.subplots(count, 1, squeeze=False, **more).flat)


def counted(*axes: Axis) -> None:
    """Ticks of these axes as 469M."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _position: format_count(round(value))))


def tokens_axis(axes: Axes, label: str = "training tokens") -> None:
    counted(axes.xaxis)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)


def labelled(*panels: Axes) -> dict[str, Any]:
    """label -> what has it in these panels, each once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def legend_above(axes: Axes, title: str, named: Mapping[str, Any]) -> None:
    """A legend between title and panel, where it hides no data: in a row, or in two of what is too long for one."""
    style: dict[str, Any] = {"handlelength": 1.8, "columnspacing": 1.2, "borderaxespad": 0.1, "borderpad": 0.2}
    rows = 1 if sum(len(label) + 6 for label in named) < ROOM_OF_ROW else 2
    style |= {"ncols": max(1, -(-len(named) // rows)), "fontsize": 8.5 if len(named) < 5 else 7.5}
    axes.set_title(title, pad=8 + 14 * rows)
    legend = axes.legend(named.values(), named, loc="lower left", bbox_to_anchor=(0.0, 1.0), **style)
    legend.set_in_layout(False)  # a long one must not make the panel narrower


def legend_below(figure: Figure) -> None:
    """A legend of all that has a label below the panels, for which the figure grows by as much."""
    named = labelled(*figure.axes)
    ncols = max(1, min(len(named), ROOM_OF_LEGEND // (max(map(len, named), default=0) + 6)))
    figure.set_figheight(figure.get_figheight() + LINE_OF_LEGEND * -(-len(named) // ncols))
    figure.legend(named.values(), named, loc="outside lower center", ncols=ncols)


def save_figure(figure: Figure, out: Path) -> Path:
    """Renders to memory first: a picture is never half-written; the same records give the same bytes."""
    write_atomically(out, _rendered(figure, "svg" if out.suffix.lower() == ".svg" else "png"))
    return out


def inline_svg(figure: Figure, name: str) -> str:
    """SVG for an HTML page; ids carry the figure's name, so that figures of a page do not take each other's shapes."""
    more = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}
    text = _rendered(figure, "svg", **more).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")


def _rendered(figure: Figure, kind: str, **more: Any) -> bytes:
    content = io.BytesIO()
    with styled(**more):
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
