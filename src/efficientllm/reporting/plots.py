"""Pictures of runs: each figure of a report, several runs overlaid, and three of them together as RUN/run.png."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from efficientllm.errors import UsageError
from efficientllm.reporting.plot_maps import architecture, units
from efficientllm.reporting.plot_style import (
    LOSS_COLOUR,
    PHASE_COLOUR,
    SIZE_COLOUR,
    VALIDATION_COLOUR,
    counted,
    labelled,
    legend_above,
    legend_below,
    panels,
    run_style,
    save_figure,
    series,
    styled,
    tokens_axis,
)
from efficientllm.reporting.plot_types import RATIO, SALIENCY, by_type
from efficientllm.reporting.run_record import RunRecord, read_run

Runs = Sequence[RunRecord]


def figures(runs: Runs) -> Iterator[tuple[str, str, Callable[[], Figure | None]]]:
    """(file stem, caption, what draws it; None where no run has data for it)."""
    makers: dict[str, tuple[str, Callable[[Runs], Figure | None]]] = {
        "loss": ("Validation loss (dots), training loss (line, smoothed) and parameters over tokens", _loss),
        "saliency": (SALIENCY.caption, partial(by_type, SALIENCY)),
        "ratio": (RATIO.caption, partial(by_type, RATIO)),
        "architecture": ("The architecture as it shrank: each width as a share of the source's", architecture),
        "units": ("Which units went, and when: bright ones early, grey ones stayed", units),
        "throughput": ("Throughput in training; triangles: compactions", _throughput),
    }
    for name, (caption, maker) in makers.items():
        yield name, caption, styled()(partial(maker, runs))


@styled()
def plot_run(folder: Path | str, out: Path | str) -> Path:
    """Draws the run in `folder` to `out` (.png or .svg) and returns `out`.

    Three panels over tokens: saliency, pruning ratio, loss with size. The pruning phase is shaded; when it is less than
    half of the run the upper two panels show it alone; when nothing was pruned they are left out.
    Raises UsageError when the run has no records yet.
    """
    run = read_run(Path(folder))
    if not run.metrics:
        raise UsageError(f"{folder} has no metrics.jsonl with records: give the folder of a run that has started")
    pruned = bool(run.events) or any(line.get("saliency") for line in run.metrics)
    figure = Figure(figsize=(9, 10.5 if pruned else 4.8))
    figure.suptitle(run.name)
    *upper, loss = figure.subplots(3, 1, height_ratios=(1, 1, 1.3)) if pruned else [figure.subplots()]
    size = _draw_loss(loss, [run])
    end = run.metrics[-1]["tokens"]
    begin, stop = (choose((event["tokens"] for event in run.events), default=0.0) for choose in (min, max))
    zoomed = 0.0 < stop < end / 2
    for axes, quantity in zip(upper, (SALIENCY, RATIO), strict=False):
        quantity.draw(axes, run)
        last = zoomed and quantity is RATIO
        tokens_axis(axes, "training tokens, pruning phase only (shaded below)" if last else "")
        axes.tick_params(labelbottom=last)
    titles = [SALIENCY.caption, RATIO.caption, "Loss and size"][-1 - len(upper) :]
    for axes, caption in zip((*upper, loss), titles, strict=True):
        legend_above(axes, caption, labelled(axes, *([size] if axes is loss else [])))
        axes.set_xlim(0, stop * 1.06 if zoomed and axes is not loss else end)
        if pruned:
            (size if axes is loss else axes).axvspan(begin, stop, color=PHASE_COLOUR, zorder=0, linewidth=0)
    return save_figure(figure, Path(out))


def _loss(runs: Runs) -> Figure | None:
    shown = [run for run in runs if run.metrics]
    if not shown:
        return None
    figure, (axes,) = panels(height=4.2)
    _draw_loss(axes, shown)
    legend_below(figure)
    return figure


def _draw_loss(axes: Axes, runs: Runs) -> Axes:
    """Loss and size of one run with all of its lines, of several with one colour and one label each; the axes of the
    size, which lie behind."""
    size = axes.twinx()
    for index, run in enumerate(runs):
        if len(runs) == 1:
            _draw_one(axes, size, run)
        else:
            _draw_among_others(axes, size, run, index)
    limits = [value for run in runs for value in _limits(run)]
    if limits:
        margin = 0.06 * (max(limits) - min(limits)) or 0.05
        axes.set_ylim(min(limits) - margin, max(limits) + margin)
    tokens_axis(axes)
    axes.set_ylabel("loss (nats per token)")
    size.set_ylim(bottom=0)
    size.set_ylabel("parameters" if len(runs) == 1 else "live parameters (dashed)")
    size.grid(False)
    counted(size.yaxis)
    axes.set_zorder(size.get_zorder() + 1)  # the size lies behind, and the loss panel's own paper must not cover it
    axes.patch.set_visible(False)
    return size


def _draw_one(axes: Axes, size: Axes, run: RunRecord) -> None:
    at, losses = series(run.metrics, "loss")
    axes.plot(at, losses, color="#B0B0B0", linewidth=0.6, alpha=0.6)
    dots = "." if len(at) < 20 else ""  # a line through one point is invisible
    axes.plot(at, _smooth(losses), marker=dots, color=LOSS_COLOUR, label="training loss (smoothed)")
    at, losses = series(run.metrics, "validation_loss")
    style: dict[str, Any] = {"markeredgecolor": "black", "markersize": 6, "clip_on": False, "zorder": 4}
    if len(at):
        axes.plot(at, losses, "o", color=VALIDATION_COLOUR, label=_said(run), **style)
    for place in _falls(run):
        told = "tokens fell: losses are of other tokens from here"
        axes.axvline(place, color="#404040", linestyle=":", linewidth=1.0, label=told)
    for word, line in {"live": "-", "allocated": (0, (3, 1.5))}.items():
        at, parameters = series(run.metrics, f"{word}_parameters")
        style = {"color": SIZE_COLOUR, "linestyle": line, "linewidth": 1.6, "drawstyle": "steps-post"}
        if len(at):
            size.plot(at, parameters, label=f"{word} parameters", **style)
    at, parameters = series(run.compactions, "allocated_after")
    if len(at):
        size.plot(at, parameters, "v", color=SIZE_COLOUR, markeredgecolor="#7A5200", label="compaction")


def _draw_among_others(axes: Axes, size: Axes, run: RunRecord, index: int) -> None:
    colour, line, marker = run_style(index)
    at, losses = series(run.metrics, "loss")
    (handle,) = axes.plot(at, _smooth(losses), color=colour, linestyle=line, linewidth=1.4)
    at, losses = series(run.metrics, "validation_loss")
    if len(at):
        style: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": 1.0, "markersize": 5}
        (handle,) = axes.plot(at, losses, marker=marker, clip_on=False, **style)
    falls = _falls(run)
    for place in falls:
        axes.axvline(place, color=colour, linestyle=":", linewidth=1.0)
    handle.set_label(f"{run.name}: {'loss of other tokens after the dotted line' if falls else _said(run)}")
    at, live = series(run.metrics, "live_parameters")
    size.step(at, live, where="post", color=colour, linestyle=(0, (4, 2)), linewidth=1.2)


def _said(run: RunRecord) -> str:
    _, losses = series(run.metrics, "validation_loss")
    return f"validation loss, {losses[-1]:.3f} at the end" if len(losses) else "training loss"


def _falls(run: RunRecord) -> list[float]:
    """Where tokens of the vocabulary fell."""
    return [line["tokens"] for line in run.compactions if line.get("vocabulary")]


def _limits(run: RunRecord) -> list[float]:
    """Losses that the axis has to reach: no spike of the raw loss, nor the fall of a fresh model, which would flatten
    the rest."""
    smoothed = _smooth(series(run.metrics, "loss")[1])
    return [*series(run.metrics, "validation_loss")[1], *smoothed[len(smoothed) // 20 :]]


def _smooth(values: np.ndarray) -> np.ndarray:
    """The centred mean over about a fiftieth of the run (at least three steps), cut short at its ends."""
    mean = partial(uniform_filter1d, size=2 * (len(values) // 100) + 3, mode="constant")
    smoothed: np.ndarray = mean(values) / mean(np.ones_like(values))
    return smoothed


def _throughput(runs: Runs) -> Figure | None:
    figure, (axes,) = panels()
    for index, run in enumerate(runs):
        colour, style, _ = run_style(index)
        lines = [line for line in run.metrics if line.get("tokens_per_second") and line.get("seconds") is not None]
        clock = np.cumsum([line["seconds"] for line in lines])
        speed = np.array([line["tokens_per_second"] for line in lines])
        label = "tokens per second" if len(runs) == 1 else run.name
        if lines:
            axes.plot(clock, speed, color=colour, linestyle=style, linewidth=1.0, label=label)
        places = np.searchsorted([line["step"] for line in lines], [each["step"] for each in run.compactions])
        places = places[places < len(lines)].astype(int)
        axes.plot(clock[places], speed[places], "v", color=colour, markeredgecolor="#000000", markersize=6)
    if not labelled(axes):
        return None
    axes.set(ylim=(0, None), xlabel="seconds of training", ylabel="tokens per second")
    counted(axes.yaxis)
    legend_below(figure)
    return figure
