"""What the pictures of a run share: colours, how axes are dressed, and how a figure becomes a file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from efficientllm.reporting.journal import write_atomically
from efficientllm.sizes import format_count

Record = Mapping[str, Any]

# Okabe and Ito's palette: told apart with any colour vision; line styles tell them apart in grey
TYPE_STYLES: dict[str, tuple[str, Any, str]] = {  # colour, line style, label
    "attention": ("#0072B2", "-", "attention (KV groups)"),
    "attention_query": ("#CC79A7", (0, (5, 1)), "attention_query (heads per KV group)"),
    "ffn": ("#D55E00", "-", "ffn (channels)"),
    "stem": ("#009E73", "-", "stem (hidden channels)"),
    "depth": ("#8C510A", (0, (1, 1)), "depth (layers)"),
}
LOSS_COLOUR = "#000000"
VALIDATION_COLOUR = "#56B4E9"
SIZE_COLOUR = "#E69F00"
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PHASE_COLOUR = "#F3F3F3"
FONT_SIZE = 10
DOTS_PER_INCH = 130


def series(records: Iterable[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, values) of the records that have a number under `key`; a diverged loss is recorded as null."""
    pairs = [(record["tokens"], record[key]) for record in records if record.get(key) is not None]
    return columns(pairs)


def positive(pairs: Iterable[tuple[float, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Keep what a logarithmic axis can show."""
    return columns([(tokens, value) for tokens, value in pairs if value is not None and value > 0.0])


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred mean over about a fiftieth of the run (at least three steps), cut short at its ends."""
    at = np.arange(len(values))
    reach = len(values) // 100 + 1
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last] - total[first]) / (last - first)


def limit_to(axes: Axes, values: Sequence[float]) -> None:
    """Fit the axis to `values`, so that one spike of the raw loss does not flatten everything else."""
    if len(values):
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def dress(axes: Axes, title: str, ylabel: str, *, pad: float = 22) -> None:
    """Dress `axes`; `pad` (points) is the room between title and panel, where `legend_above` puts its row."""
    axes.set_title(title, loc="left", fontsize=FONT_SIZE + 1, pad=pad)
    axes.xaxis.set_major_formatter(FuncFormatter(count_label))
    axes.set_ylabel(ylabel, fontsize=FONT_SIZE)
    axes.tick_params(which="both", labelsize=FONT_SIZE - 1)
    axes.grid(True, color="#000000", alpha=0.1, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend_above(axes: Axes, handles: list[Any] | None = None) -> None:
    """Put the legend in a row between title and panel, where it hides no data."""
    handles = handles if handles is not None else axes.get_legend_handles_labels()[0]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=max(len(handles), 1),
        frameon=False,
        fontsize=FONT_SIZE - 1.5,
        handlelength=1.8,
        columnspacing=1.2,
        borderaxespad=0.1,
        borderpad=0.2,
    )


def count_label(value: float, _position: int | None = None) -> str:
    return format_count(round(value))


def save_figure(figure: Figure, out: Path) -> Path:
    """Render to memory first: a picture is never half-written; the same records give the same bytes."""
    kind = "svg" if out.suffix.lower() == ".svg" else "png"
    content = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "efficientllm"}):
        figure.savefig(content, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
    write_atomically(out, content.getvalue())
    return out
