"""Saliency and pruning ratio of every pruning type: a line a type of one run, or a panel a type of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from efficientllm.pruning.dimensions import ATTENTION, ATTENTION_QUERY
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.plot_style import TYPE_STYLES, columns, dress, legend_below, panel, run_style, tokens_axis
from efficientllm.reporting.run_record import RunRecord

Points = tuple[np.ndarray, np.ndarray]


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
            at, values = self.curve(run, kind)
            if kind == ATTENTION and run.source_widths and run.source_widths.count(ATTENTION_QUERY) == 1:
                label = "attention (heads)"  # without grouped queries a KV group is an ordinary head
            if len(at):
                axes.plot(at, values, color=colour, linestyle=line, label=label, **self.style)
            if self is SALIENCY:
                taken = [event for event in run.events if event["type"] == kind]
                at, values = _positive([(event["tokens"], event.get("damage_per_parameter")) for event in taken])
                axes.plot(at, values, "|", color=colour, markersize=6, alpha=0.6)
        self.scale(axes)


def by_type(quantity: Quantity, runs: Sequence[RunRecord]) -> Figure | None:
    """One run: a panel with a line a type. Several: a panel a type with a line a run, all in their runs' colours."""
    found = {kind: [quantity.curve(run, kind) for run in runs] for kind in TYPE_STYLES}
    kinds = [kind for kind, curves in found.items() if any(len(at) for at, _ in curves)]
    if not kinds:
        return None
    if len(runs) == 1:
        figure, axes = panel()
        panels: Sequence[Axes] = [axes]
        quantity.draw(axes, runs[0])
        handles, labels = axes.get_legend_handles_labels()
    else:
        figure = Figure(figsize=(8.4, 1.0 + 2.1 * len(kinds) if len(kinds) > 1 else 3.4), layout="constrained")
        panels = list(np.atleast_1d(figure.subplots(len(kinds), 1, sharex=True)))
        named: dict[str, Any] = {}
        for axes, kind in zip(panels, kinds, strict=True):
            for index, (at, values) in enumerate(found[kind]):
                colour, line, _ = run_style(index)
                if len(at):
                    drawn = axes.plot(at, values, color=colour, linestyle=line, **quantity.style)
                    named.setdefault(runs[index].name, drawn[0])
            quantity.scale(axes)
        labels, handles = list(named), list(named.values())
    for axes, kind in zip(panels, kinds, strict=False):
        last = axes is panels[-1]
        dress(axes, "training tokens" if last else "", quantity.unit, title=kind if len(runs) > 1 else "")
        tokens_axis(axes)
    legend_below(figure, handles, labels)
    return figure


def _positive(pairs: Sequence[tuple[float, float | None]]) -> Points:
    """What a logarithmic axis can show."""
    return columns([(tokens, value) for tokens, value in pairs if value is not None and value > 0.0])


def _saliency(run: RunRecord, kind: str) -> Points:
    return _positive([(line["tokens"], (line.get("saliency") or {}).get(kind)) for line in run.metrics])


def _ratio(run: RunRecord, kind: str) -> Points:
    source = run.source_widths
    if source is None or kind not in source.types():
        return columns([])
    seen = ((line["tokens"], Widths(**line["widths"]).count(kind)) for line in run.metrics if "widths" in line)
    lines = [(tokens, 1 - left / source.count(kind)) for tokens, left in seen]
    return columns([(0.0, 0.0), *lines]) if any(ratio > 0 for _, ratio in lines) else columns([])


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
