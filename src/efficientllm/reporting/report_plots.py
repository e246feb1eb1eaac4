"""The plots of a report, one figure each, several runs overlaid where that reads well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from efficientllm.reporting.plot_style import (
    FONT_SIZE,
    TYPE_STYLES,
    columns,
    count_label,
    limit_to,
    positive,
    series,
    smooth,
)
from efficientllm.reporting.report_maps import architecture, units
from efficientllm.reporting.report_style import dress_panel, label_of, legend, panel, run_style, tokens_axis
from efficientllm.reporting.run_record import RunRecord

WIDTHS = {
    "hidden": "stem",
    "intermediate": "ffn",
    "kv_heads": "attention",
    "heads": "attention_query",
    "layers": "depth",
}


def figures(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str, Callable[[], Figure | None]]]:
    """(file stem, caption, what draws it; None where no run has data for it)."""
    makers: dict[str, tuple[str, Callable[[Sequence[RunRecord]], Figure | None]]] = {
        "loss": ("Validation loss (dots), training loss (line) and live parameters over tokens", _loss),
        "saliency": ("Saliency: predicted damage per parameter of each type's next event, over tokens", _saliency),
        "ratio": ("Pruning ratio of each type over tokens", _ratio),
        "architecture": ("The architecture as it shrank: each width as a share of the source's", architecture),
        "units": ("Which units went, and when: bright ones early, grey ones stayed", units),
        "throughput": ("Throughput in training; triangles: compactions", _throughput),
    }
    for name, (caption, maker) in makers.items():
        yield name, caption, partial(maker, runs)


def _loss(runs: Sequence[RunRecord]) -> Figure | None:
    shown = [run for run in runs if run.metrics]
    if not shown:
        return None
    figure, axes = panel(4.2)
    size = axes.twinx()
    limits: list[float] = []
    named: list[tuple[Any, str]] = []
    for index, run in enumerate(shown):
        colour, line, marker = run_style(index)
        at, losses = series(run.metrics, "loss")
        smoothed = smooth(losses)
        label = label_of(shown, run, "training loss")
        handle = axes.plot(at, smoothed, color=colour, linestyle=line, linewidth=1.0, alpha=0.7, label=label)[0]
        where, values = series(run.metrics, "validation_loss")
        if len(values):
            label = label_of(shown, run, f"validation, {values[-1]:.3f} at the end")
            handle = axes.plot(
                where, values, marker, linestyle=line, color=colour, markersize=4, linewidth=1.6, label=label
            )[0]
        named.append((handle, label))
        limits += [*values, *smoothed[len(smoothed) // 20 :]]
        where, values = series(run.metrics, "live_parameters")
        size.step(where, values, where="post", color=colour, linestyle=(0, (4, 2)), linewidth=1.2)
    limit_to(axes, limits)
    size.set_ylim(bottom=0)
    size.set_ylabel("live parameters (dashed)", fontsize=FONT_SIZE)
    size.yaxis.set_major_formatter(FuncFormatter(count_label))
    size.spines["top"].set_visible(False)
    axes.set_zorder(size.get_zorder() + 1)
    axes.patch.set_visible(False)
    dress_panel(axes, "training tokens", "loss (nats per token)")
    tokens_axis(axes)
    legend(figure, axes, named if len(runs) > 1 else None)
    return figure


Curve = Callable[[RunRecord, str], tuple[np.ndarray, np.ndarray]]


def _by_type(runs: Sequence[RunRecord], curve: Curve, ylabel: str, style: Mapping[str, Any]) -> Figure | None:
    """One run: a panel with a line a type. Several: a panel a type with a line a run, all in their runs' colours."""
    found = {kind: [(run, *curve(run, kind)) for run in runs] for kind in TYPE_STYLES}
    kinds = [kind for kind, lines in found.items() if any(len(at) for _, at, _ in lines)]
    if not kinds:
        return None
    several = len(runs) > 1
    count = len(kinds) if several else 1
    figure = Figure(figsize=(8.4, 3.4 if count == 1 else 1.0 + 2.1 * count), layout="constrained")
    panels = np.atleast_1d(figure.subplots(count, 1, sharex=True))
    named: dict[str, Any] = {}
    for place, kind in enumerate(kinds):
        axes = panels[place if several else 0]
        for index, (run, at, values) in enumerate(found[kind]):
            if not len(at):
                continue
            colour, line, _ = run_style(index) if several else (TYPE_STYLES[kind][0], "-", "")
            handle = axes.plot(at, values, color=colour, linestyle=line, label=kind, **style)[0]
            named.setdefault(run.name, handle)
        if several:
            axes.set_title(kind, fontsize=FONT_SIZE, loc="left")
    for axes in panels:
        dress_panel(axes, "training tokens" if axes is panels[-1] else "", ylabel)
        tokens_axis(axes)
    legend(figure, panels[0], [(handle, name) for name, handle in named.items()] if several else None)
    return figure


def _saliency(runs: Sequence[RunRecord]) -> Figure | None:
    def curve(run: RunRecord, kind: str) -> tuple[np.ndarray, np.ndarray]:
        return positive([(line["tokens"], (line.get("saliency") or {}).get(kind)) for line in run.metrics])

    figure = _by_type(runs, curve, "nats per parameter", {"marker": ".", "markersize": 3, "linewidth": 1.0})
    for axes in figure.axes if figure else ():
        axes.set_yscale("log")
    return figure


def _ratio(runs: Sequence[RunRecord]) -> Figure | None:
    widths = {kind: width for width, kind in WIDTHS.items()}

    def curve(run: RunRecord, kind: str) -> tuple[np.ndarray, np.ndarray]:
        if not run.source_widths or not run.events:
            return columns([])
        at, shares = _shares(run, widths[kind])
        return (at, 1 - shares) if shares.min() < 1.0 else columns([])

    figure = _by_type(runs, curve, "pruned share", {"drawstyle": "steps-post"})
    for axes in figure.axes if figure else ():
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def _shares(run: RunRecord, width: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and what is left of one width as a share of the source's; of query heads: within a KV group."""
    source = run.source_widths
    assert source is not None

    def value(widths: dict[str, int]) -> float:
        return widths["heads"] / widths["kv_heads"] if width == "heads" else float(widths[width])

    lines = [(line["tokens"], value(line["widths"]) / value(source)) for line in run.metrics if "widths" in line]
    at, shares = np.array([(0.0, 1.0), *lines], dtype=float).T
    return at, shares


def _throughput(runs: Sequence[RunRecord]) -> Figure | None:
    figure, axes = panel()
    named: list[tuple[Any, str]] = []
    for index, run in enumerate(runs):
        colour, style, _ = run_style(index)
        lines = [line for line in run.metrics if line.get("tokens_per_second") and line.get("seconds") is not None]
        if not lines:
            continue
        clock = np.cumsum([line["seconds"] for line in lines])
        speed = np.array([line["tokens_per_second"] for line in lines])
        label = label_of(runs, run, "tokens per second")
        named.append((axes.plot(clock, speed, color=colour, linestyle=style, linewidth=1.0, label=label)[0], run.name))
        steps = np.array([line["step"] for line in lines])
        places = [int(np.searchsorted(steps, each["step"])) for each in run.compactions]
        places = [place for place in places if place < len(lines)]
        axes.plot(clock[places], speed[places], "v", color=colour, markeredgecolor="#000000", markersize=6)
    if not named:
        return None
    axes.set_ylim(bottom=0)
    dress_panel(axes, "seconds of training", "tokens per second")
    axes.yaxis.set_major_formatter(FuncFormatter(count_label))
    legend(figure, axes, named if len(runs) > 1 else None)
    return figure
