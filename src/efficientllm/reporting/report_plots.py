"""The plots of a report, one figure each, several runs overlaid where that reads well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from efficientllm.pruning.groups import Widths
from efficientllm.pruning.history import fallen_at
from efficientllm.reporting.plots import FONT_SIZE, RUN_COLOURS, TYPE_STYLES
from efficientllm.reporting.run_record import RunRecord
from efficientllm.sizes import format_count

RUN_LINES = ("-", (0, (5, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
WIDTHS = {
    "hidden": "stem",
    "intermediate": "ffn",
    "kv_heads": "attention",
    "heads": "attention_query",
    "layers": "depth",
}
WIDTH_LABELS = {"intermediate": "FFN", "kv_heads": "KV heads"}
UNIT_ROWS = {"ffn": "layer", "attention": "layer", "attention_query": "KV group", "stem": "model"}


def figures(runs: Sequence[RunRecord]) -> dict[str, tuple[str, Figure]]:
    """File stem -> (caption, figure); plots for which no run has data are left out."""
    makers: dict[str, tuple[str, Callable[[Sequence[RunRecord]], Figure | None]]] = {
        "loss": ("Validation loss (dots), training loss (line) and live parameters over tokens", _loss),
        "saliency": ("Saliency: predicted damage per parameter of each type's next event, over tokens", _saliency),
        "ratio": ("Pruning ratio of each type over tokens", _ratio),
        "architecture": ("The architecture as it shrank: each width as a share of the source's", _architecture),
        "units": ("Which units went, and when: bright ones early, grey ones stayed", _units),
        "throughput": ("Throughput in training; triangles: compactions", _throughput),
    }
    made = {name: (caption, maker(runs)) for name, (caption, maker) in makers.items()}
    return {name: (caption, figure) for name, (caption, figure) in made.items() if figure is not None}


def _panel(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, figure.subplots()


def _dress(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=FONT_SIZE)
    axes.set_ylabel(ylabel, fontsize=FONT_SIZE)
    axes.grid(True, color="#000000", alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=FONT_SIZE - 1.5, frameon=False, ncols=2, loc="best")


def _tokens(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(round(value))))
    axes.set_xlim(left=0)


def _label(runs: Sequence[RunRecord], run: RunRecord, text: str) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


def _loss(runs: Sequence[RunRecord]) -> Figure | None:
    shown = [run for run in runs if run.metrics]
    if not shown:
        return None
    figure, axes = _panel(4.2)
    size = axes.twinx()
    limits: list[float] = []
    for index, run in enumerate(shown):
        colour = RUN_COLOURS[index % len(RUN_COLOURS)]
        points = [(line["tokens"], line["loss"]) for line in run.metrics if line.get("loss") is not None]
        at, losses = np.array(points, dtype=float).reshape(-1, 2).T
        reach = max(1, len(losses) // 50)
        smooth = np.convolve(np.pad(losses, (reach, reach), "edge"), np.ones(2 * reach + 1) / (2 * reach + 1), "valid")
        axes.plot(at, smooth, color=colour, linewidth=1.0, alpha=0.7, label=_label(shown, run, "training loss"))
        seen = [
            (line["tokens"], line["validation_loss"]) for line in run.metrics if line.get("validation_loss") is not None
        ]
        if seen:
            where, values = np.array(seen, dtype=float).T
            label = _label(shown, run, f"validation, {values[-1]:.3f} at the end")
            axes.plot(where, values, "o-", color=colour, markersize=4, linewidth=1.6, label=label)
            limits += list(values)
        limits += list(smooth[len(smooth) // 20 :])
        live = [(line["tokens"], line["live_parameters"]) for line in run.metrics if "live_parameters" in line]
        where, values = np.array(live, dtype=float).reshape(-1, 2).T
        size.step(where, values, where="post", color=colour, linestyle=(0, (4, 2)), linewidth=1.2)
    low, high = min(limits, default=0.0), max(limits, default=1.0)
    axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    size.set_ylim(bottom=0)
    size.set_ylabel("live parameters (dashed)", fontsize=FONT_SIZE)
    size.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(round(value))))
    size.spines["top"].set_visible(False)
    axes.set_zorder(size.get_zorder() + 1)
    axes.patch.set_visible(False)
    _dress(axes, "training tokens", "loss (nats per token)")
    _tokens(axes)
    return figure


def _saliency(runs: Sequence[RunRecord]) -> Figure | None:
    figure, axes = _panel()
    for index, run in enumerate(runs):
        for kind, (colour, _, _) in TYPE_STYLES.items():
            points = [(line["tokens"], (line.get("saliency") or {}).get(kind)) for line in run.metrics]
            points = [(at, value) for at, value in points if value]
            if points:
                at, values = np.array(points, dtype=float).T
                line = RUN_LINES[index % len(RUN_LINES)]
                axes.plot(at, values, ".", linestyle=line, color=colour, markersize=3, label=_label(runs, run, kind))
    if not axes.lines:
        return None
    axes.set_yscale("log")
    _dress(axes, "training tokens", "nats per parameter")
    _tokens(axes)
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


def _ratio(runs: Sequence[RunRecord]) -> Figure | None:
    figure, axes = _panel()
    for index, run in enumerate(run for run in runs if run.source_widths and run.events):
        for width, kind in WIDTHS.items():
            at, shares = _shares(run, width)
            if shares.min() < 1.0:
                colour, line = TYPE_STYLES[kind][0], RUN_LINES[index % len(RUN_LINES)]
                axes.step(at, 1 - shares, where="post", color=colour, linestyle=line, label=_label(runs, run, kind))
    if not axes.lines:
        return None
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _dress(axes, "training tokens", "pruned share")
    _tokens(axes)
    return figure


def _architecture(runs: Sequence[RunRecord]) -> Figure | None:
    """A bar for each width at the source, on the way (thirds of the events) and at the end, a group a run."""
    shown = [run for run in runs if run.source_widths and run.events]
    if not shown:
        return None
    figure = Figure(figsize=(8.4, 2.6 * len(shown) + 0.4), layout="constrained")
    for axes, run in zip(np.atleast_1d(figure.subplots(len(shown), 1)), shown, strict=True):
        assert run.source_widths is not None
        count = len(run.events)
        stages = [run.source_widths, *(dict(run.events[index]["widths"]) for index in (count // 3, 2 * count // 3, -1))]
        names = ("hidden", "heads", "kv_heads", "intermediate", "layers")
        for place, stage in enumerate(stages):
            shares = [stage[width] / stages[0][width] for width in names]
            offset = np.arange(len(names)) + 0.2 * (place - 1.5)
            label = ("source", "a third of the events", "two thirds", "end")[place]
            axes.bar(offset, shares, width=0.19, color=str(0.75 - 0.2 * place), edgecolor="#0072B2", label=label)
            for x, share, width in zip(offset, shares, names, strict=True):
                axes.text(x, share, str(stage[width]), ha="center", va="bottom", fontsize=FONT_SIZE - 3)
        axes.set_xticks(range(len(names)), [WIDTH_LABELS.get(width, width) for width in names])
        axes.set_ylim(0, 1.45)
        axes.set_title(run.name, fontsize=FONT_SIZE, loc="left")
        _dress(axes, "", "share of the source's")
    return figure


def _units(runs: Sequence[RunRecord]) -> Figure | None:
    """A map a type and run: rows are layers (of query heads: KV groups), columns units, colour the time."""
    maps = []
    for run in runs:
        if not run.source_widths or not run.events:
            continue
        try:
            when = fallen_at(Widths(**run.source_widths), run.events, run.compactions)
        except ValueError as error:
            run.notes.append(f"the map of units is left out: {error}")
            continue
        wanted = {kind: table.numpy() for kind, table in when.items() if kind in UNIT_ROWS}
        maps += [
            (run, kind, table) for kind, table in wanted.items() if np.isfinite(table).any() and table.shape[1] > 1
        ]
    if not maps:
        return None
    heights = [0.55 + min(2.2, 0.12 * table.shape[0]) for _, _, table in maps]
    figure = Figure(figsize=(8.4, sum(heights) + 0.5 * len(maps)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(maps), 1, height_ratios=heights))
    last = max(float(table[np.isfinite(table)].max()) for _, _, table in maps)
    image = None
    for axes, (run, kind, table) in zip(panels, maps, strict=True):
        shown = np.ma.masked_invalid(table)
        axes.set_facecolor("#9A9A9A")
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="plasma_r", norm=Normalize(0, last))
        axes.set_title(_label(runs, run, kind), fontsize=FONT_SIZE, loc="left")
        axes.set_ylabel(UNIT_ROWS[kind], fontsize=FONT_SIZE - 1)
        axes.set_xlabel("unit of the source", fontsize=FONT_SIZE - 1)
        axes.tick_params(labelsize=FONT_SIZE - 2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins="auto", min_n_ticks=1))
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), shrink=0.7, label="tokens when it fell")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(round(value))))
    return figure


def _throughput(runs: Sequence[RunRecord]) -> Figure | None:
    figure, axes = _panel()
    for index, run in enumerate(runs):
        colour = RUN_COLOURS[index % len(RUN_COLOURS)]
        lines = [line for line in run.metrics if line.get("tokens_per_second") and line.get("seconds") is not None]
        if not lines:
            continue
        clock = np.cumsum([line["seconds"] for line in lines])
        speed = np.array([line["tokens_per_second"] for line in lines])
        axes.plot(clock, speed, color=colour, linewidth=1.0, label=_label(runs, run, "tokens per second"))
        steps = np.array([line["step"] for line in lines])
        places = [int(np.searchsorted(steps, each["step"])) for each in run.compactions]
        places = [place for place in places if place < len(lines)]
        axes.plot(clock[places], speed[places], "v", color=colour, markeredgecolor="#000000", markersize=6)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    _dress(axes, "seconds of training", "tokens per second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(round(value))))
    return figure
