"""Saliency and pruning ratio of every pruning type: a line a type of one run, or a panel a type of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from efficientllm.pruning.dimensions import ATTENTION, ATTENTION_QUERY
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.plot_style import TYPE_STYLES, Points, legend_below, panels, points, run_style, tokens_axis
from efficientllm.reporting.run_record import RunRecord


@dataclass(frozen=True)
class Quantity:
    """What is drawn of every pruning type. curve: a run and a type -> points, none where there is nothing to show."""

    caption: str
    unit: str
    curve: Callable[[RunRecord, str], Points]
    style: Mapping[str, Any]
    scale: Callable[[Axes], object]

    def draw(self, axes: Axes, run: RunRecord) -> None:
        """A line a type, in the type's colour; where saliency is drawn, a tick an event."""
        for kind, (colour, line, label) in TYPE_STYLES.items():
            if kind == ATTENTION and run.source_widths and run.source_widths.count(ATTENTION_QUERY) == 1:
                label = "attention (heads)"  # without grouped queries a KV group is an ordinary head
            self.plot(axes, self.curve(run, kind), colour, line, label)
            if self is SALIENCY:
                taken = (event for event in run.events if event["type"] == kind)
                ticks = _positive((event["tokens"], event.get("damage_per_parameter")) for event in taken)
                axes.plot(*ticks, "|", color=colour, markersize=6, alpha=0.6)
        self.finish(axes)

    def plot(self, axes: Axes, curve: Points, colour: str, line: Any, label: str) -> None:
        if len(curve[0]):
            axes.plot(*curve, color=colour, linestyle=line, label=label, **self.style)

    def finish(self, axes: Axes) -> None:
        self.scale(axes)
        axes.set_ylabel(self.unit)


def by_type(quantity: Quantity, runs: Sequence[RunRecord]) -> Figure | None:
    """One run: a panel with a line a type. Several: a panel a type with a line a run, all in their runs' colours."""
    kinds = [kind for kind in TYPE_STYLES if any(len(quantity.curve(run, kind)[0]) for run in runs)]
    if not kinds:
        return None
    if len(runs) == 1:
        figure, drawn = panels()
        quantity.draw(drawn[0], runs[0])
    else:
        figure, drawn = panels(len(kinds), max(3.4, 1.0 + 2.1 * len(kinds)), sharex=True)
        for axes, kind in zip(drawn, kinds, strict=True):
            for index, run in enumerate(runs):
                colour, line, _ = run_style(index)
                quantity.plot(axes, quantity.curve(run, kind), colour, line, run.name)
            quantity.finish(axes)
            axes.set_title(kind)
    for axes in drawn:
        tokens_axis(axes, "training tokens" if axes is drawn[-1] else "")
    legend_below(figure)
    return figure


def _positive(pairs: Any) -> Points:
    """What a logarithmic axis can show."""
    return points((tokens, value) for tokens, value in pairs if value is not None and value > 0.0)


def _saliency(run: RunRecord, kind: str) -> Points:
    return _positive((line["tokens"], (line.get("saliency") or {}).get(kind)) for line in run.metrics)


def _ratio(run: RunRecord, kind: str) -> Points:
    source = run.source_widths
    if source is None or kind not in source.types():
        return points([])
    seen = ((line["tokens"], Widths(**line["widths"]).count(kind)) for line in run.metrics if "widths" in line)
    lines = [(tokens, 1 - left / source.count(kind)) for tokens, left in seen]
    return points([(0.0, 0.0), *lines] if any(ratio > 0 for _, ratio in lines) else [])


SALIENCY = Quantity(
    "Saliency: predicted damage per parameter of each type's next event (ticks: events taken)",
    "nats per parameter",
    _saliency,
    {"marker": ".", "markersize": 3, "linewidth": 1.0},
    lambda axes: axes.set_yscale("log"),
)
RATIO = Quantity(
    "Pruning ratio of each type over tokens",
    "pruned share of the width",
    _ratio,
    {"drawstyle": "steps-post", "linewidth": 1.8},
    lambda axes: axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0)),
)
