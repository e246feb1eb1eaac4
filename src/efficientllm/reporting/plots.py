"""Pictures of runs: each figure of a report, several runs overlaid, and three of them together as RUN/run.png."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from efficientllm.errors import UsageError
from efficientllm.reporting.plot_maps import architecture, units
from efficientllm.reporting.plot_style import (
    FONT_SIZE,
    LOSS_COLOUR,
    PHASE_COLOUR,
    SIZE_COLOUR,
    VALIDATION_COLOUR,
    count_label,
    dress,
    legend_above,
    legend_below,
    limit_to,
    panel,
    run_style,
    save_figure,
    series,
    smooth,
    tokens_axis,
)
from efficientllm.reporting.plot_types import RATIO, SALIENCY, by_type
from efficientllm.reporting.run_record import RunRecord, read_run

Runs = Sequence[RunRecord]


def figures(runs: Runs) -> Iterator[tuple[str, str, Callable[[], Figure | None]]]:
    """(file stem, caption, what draws it; None where no run has data for it)."""
    makers: dict[str, tuple[str, Callable[[Runs], Figure | None]]] = {
        "loss": (LOSS_CAPTION, _loss),
        "saliency": (SALIENCY.caption, partial(by_type, SALIENCY)),
        "ratio": (RATIO.caption, partial(by_type, RATIO)),
        "architecture": ("The architecture as it shrank: each width as a share of the source's", architecture),
        "units": ("Which units went, and when: bright ones early, grey ones stayed", units),
        "throughput": ("Throughput in training; triangles: compactions", _throughput),
    }
    for name, (caption, maker) in makers.items():
        yield name, caption, partial(maker, runs)


def plot_run(folder: Path | str, out: Path | str, title: str | None = None) -> Path:
    """Draws the run in `folder` to `out` (.png or .svg) and returns `out`.

    Three panels over tokens: saliency, pruning ratio, loss with size. The pruning phase is shaded; when it is less than
    half of the run the upper two panels show it alone; when nothing was pruned they are left out.
    Raises UsageError when the run has no records yet.
    """
    run = _started(Path(folder))
    pruned = bool(run.events) or any(line.get("saliency") for line in run.metrics)
    figure = Figure(figsize=(9, 10.5 if pruned else 4.8), layout="constrained")
    figure.suptitle(title or run.name, fontsize=FONT_SIZE + 3, fontweight="bold")
    *upper, loss = figure.subplots(3, 1, height_ratios=(1, 1, 1.3)) if pruned else [figure.subplots()]
    size, handles = _draw_loss(loss, [run])
    dress(loss, "training tokens", loss.get_ylabel(), title="Loss and size", pad=22)
    legend_above(loss, handles)
    end = run.metrics[-1]["tokens"]
    loss.set_xlim(0, end)
    begin, stop = (choose((event["tokens"] for event in run.events), default=0.0) for choose in (min, max))
    zoomed = 0.0 < stop < end / 2
    for axes, quantity in zip(upper, (SALIENCY, RATIO), strict=False):
        quantity.draw(axes, run)
        dress(axes, "", quantity.unit, title=quantity.caption, pad=22)
        legend_above(axes, axes.get_legend_handles_labels()[0])
        tokens_axis(axes)
        axes.set_xlim(0, stop * 1.06 if zoomed else end)
        axes.tick_params(labelbottom=zoomed and quantity is RATIO)
    if upper and zoomed:
        upper[1].set_xlabel("training tokens, pruning phase only (shaded below)", fontsize=FONT_SIZE)
    for axes in (*upper, *([size] if pruned else [])):
        axes.axvspan(begin, stop, color=PHASE_COLOUR, zorder=0, linewidth=0)
    return save_figure(figure, Path(out))


def plot_demo(runs: Mapping[str, Path | str], out: Path | str) -> Path:
    """The learning curves of `runs` (label -> run folder) in one picture; returns `out`.

    Raises UsageError when there is no run, or one has no records yet.
    """
    if not runs:
        raise UsageError("there is no run to draw: give at least one run folder")
    figure = _loss([_started(Path(folder), label) for label, folder in runs.items()])
    assert figure is not None
    return save_figure(figure, Path(out))


def _started(folder: Path, name: str | None = None) -> RunRecord:
    run = read_run(folder, name)
    if not run.metrics:
        raise UsageError(f"{folder} has no metrics.jsonl with records: give the folder of a run that has started")
    return run


LOSS_CAPTION = "Validation loss (dots), training loss (line, smoothed) and parameters over tokens"


def _loss(runs: Runs) -> Figure | None:
    shown = [run for run in runs if run.metrics]
    if not shown:
        return None
    figure, axes = panel(4.2)
    _, handles = _draw_loss(axes, shown)
    dress(axes, "training tokens", axes.get_ylabel())
    legend_below(figure, handles, [handle.get_label() for handle in handles])
    return figure


def _draw_loss(axes: Axes, runs: Runs) -> tuple[Axes, list[Any]]:
    """Loss and size of one run with all of its lines, of several with one colour each; the axes of the size, which lie
    behind, and the lines for a legend: of several runs one each."""
    alone, size = len(runs) == 1, axes.twinx()
    handles: list[Any] = []
    limits: list[float] = []
    for index, run in enumerate(runs):
        colour, line, marker = run_style(index)
        at, losses = series(run.metrics, "loss")
        smoothed = smooth(losses)
        seen_at, validation = series(run.metrics, "validation_loss")
        limits += [*validation, *smoothed[len(smoothed) // 20 :]]  # the fall of a fresh model would flatten the rest
        said = f"validation loss, {validation[-1]:.3f} at the end" if len(validation) else "training loss"
        falls = [line["tokens"] for line in run.compactions if line.get("vocabulary")]
        if alone:
            dots = "." if len(at) < 20 else ""  # a line through one point is invisible
            axes.plot(at, losses, color="#B0B0B0", linewidth=0.6, alpha=0.6)
            train = axes.plot(at, smoothed, marker=dots, color=LOSS_COLOUR, label="training loss (smoothed)")
            style: dict[str, Any] = {"markeredgecolor": "black", "markersize": 6, "clip_on": False, "zorder": 4}
            dot = axes.plot(seen_at, validation, "o", color=VALIDATION_COLOUR, label=said, **style)
            handles += [*train, *(dot if len(validation) else []), *_draw_size(size, run)]
            lines = [axes.axvline(place, color="#404040", linestyle=":", linewidth=1.0) for place in falls]
            for line in lines[:1]:
                line.set_label("tokens fell: losses are of other tokens from here")
                handles.append(line)
        else:
            train = axes.plot(at, smoothed, color=colour, linestyle=line, linewidth=1.4)
            style = {"linestyle": line, "color": colour, "markersize": 5, "linewidth": 1.0, "clip_on": False}
            dot = axes.plot(seen_at, validation, marker, **style)
            handle = dot[0] if len(validation) else train[0]
            for place in falls:
                axes.axvline(place, color=colour, linestyle=":", linewidth=1.0)
            handle.set_label(f"{run.name}: {'loss of other tokens after the dotted line' if falls else said}")
            handles.append(handle)
            where, live = series(run.metrics, "live_parameters")
            size.step(where, live, where="post", color=colour, linestyle=(0, (4, 2)), linewidth=1.2)
    limit_to(axes, limits)
    tokens_axis(axes)
    axes.set_ylabel("loss (nats per token)")
    size.set_ylim(bottom=0)
    size.set_ylabel("parameters" if alone else "live parameters (dashed)", fontsize=FONT_SIZE)
    size.yaxis.set_major_formatter(FuncFormatter(count_label))
    size.spines["top"].set_visible(False)
    axes.set_zorder(size.get_zorder() + 1)  # the size lies behind, and the loss panel's own paper must not cover it
    axes.patch.set_visible(False)
    return size, handles


def _draw_size(axes: Axes, run: RunRecord) -> list[Any]:
    """Live and allocated parameters, and the compactions, of one run."""
    handles = []
    for word, line in {"live": "-", "allocated": (0, (3, 1.5))}.items():
        at, parameters = series(run.metrics, f"{word}_parameters")
        style: dict[str, Any] = {"color": SIZE_COLOUR, "linestyle": line, "linewidth": 1.6, "drawstyle": "steps-post"}
        handles += axes.plot(at, parameters, label=f"{word} parameters", **style) if len(at) else []
    at, parameters = series(run.compactions, "allocated_after")
    if len(at):
        style = {"color": SIZE_COLOUR, "markeredgecolor": "#7A5200", "label": "compaction"}
        handles += axes.plot(at, parameters, "v", **style)
    return handles


def _throughput(runs: Runs) -> Figure | None:
    figure, axes = panel()
    handles: dict[str, Any] = {}
    for index, run in enumerate(runs):
        colour, style, _ = run_style(index)
        lines = [line for line in run.metrics if line.get("tokens_per_second") and line.get("seconds") is not None]
        if not lines:
            continue
        clock = np.cumsum([line["seconds"] for line in lines])
        speed = np.array([line["tokens_per_second"] for line in lines])
        label = "tokens per second" if len(runs) == 1 else run.name
        handles[label] = axes.plot(clock, speed, color=colour, linestyle=style, linewidth=1.0)[0]
        places = np.searchsorted([line["step"] for line in lines], [each["step"] for each in run.compactions])
        places = places[places < len(lines)].astype(int)
        axes.plot(clock[places], speed[places], "v", color=colour, markeredgecolor="#000000", markersize=6)
    if not handles:
        return None
    axes.set_ylim(bottom=0)
    dress(axes, "seconds of training", "tokens per second")
    axes.yaxis.set_major_formatter(FuncFormatter(count_label))
    legend_below(figure, list(handles.values()), list(handles))
    return figure
