"""Pictures of a run: saliency, pruning ratio, loss and size over tokens; and learning curves of several runs.

Drawn with matplotlib's object interface, which needs no display and leaves pyplot's global state alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from efficientllm.errors import UsageError
from efficientllm.reporting.journal import read_journal
from efficientllm.reporting.plot_style import (
    FONT_SIZE,
    LOSS_COLOUR,
    PHASE_COLOUR,
    RUN_COLOURS,
    SIZE_COLOUR,
    TYPE_STYLES,
    VALIDATION_COLOUR,
    Record,
    columns,
    count_label,
    dress,
    legend_above,
    limit_to,
    positive,
    save_figure,
    series,
    smooth,
)


def plot_run(run_dir: Path | str, out: Path | str, title: str | None = None) -> Path:
    """Draw the run in `run_dir` to `out` (.png or .svg) and return `out`.

    Three panels over tokens: predicted damage per parameter (nats) of each pruning type's next event; share of each
    width that is pruned; loss, with live and allocated parameters. The pruning phase is shaded; when it is less than
    half of the run the upper two panels show it alone; when nothing was pruned they are left out.
    Raises UsageError when the run has no records yet.
    """
    run_dir = Path(run_dir)
    metrics = _metrics(run_dir)
    events = [event for event in read_journal(run_dir / "events.jsonl") if "tokens" in event]
    compactions = read_journal(run_dir / "compactions.jsonl")
    source = _source_widths(run_dir, [*metrics, *events])
    pruned = bool(events) or any(record.get("saliency") for record in metrics)
    figure = Figure(figsize=(9, 10.5 if pruned else 4.8), layout="constrained")
    figure.suptitle(title or run_dir.resolve().name, fontsize=FONT_SIZE + 3, fontweight="bold")
    *upper, loss = figure.subplots(3, 1, height_ratios=(1, 1, 1.3)) if pruned else [figure.subplots()]
    size = _draw_loss(loss, metrics, compactions)
    loss.set_xlim(0, metrics[-1]["tokens"])
    if pruned:
        _draw_saliency(upper[0], metrics, events, source)
        _draw_ratio(upper[1], metrics, source)
        _share_tokens(upper[0], upper[1], size, pruned_at=[event["tokens"] for event in events])
    return save_figure(figure, Path(out))


def plot_demo(runs: Mapping[str, Path | str], out: Path | str) -> Path:
    """Overlay the learning curves of `runs` (label -> run folder) in one picture and return `out`.

    Lines are the smoothed training loss, dots the validation loss; the legend gives each run's last validation loss.
    Raises UsageError when there is no run, or one has no records yet.
    """
    if not runs:
        raise UsageError("there is no run to draw: give at least one run folder")
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    smoothed = []
    for index, (label, run_dir) in enumerate(runs.items()):
        metrics = _metrics(Path(run_dir))
        colour = RUN_COLOURS[index % len(RUN_COLOURS)]
        tokens, losses = series(metrics, "loss")
        smoothed.append(smooth(losses))
        seen_at, validation = series(metrics, "validation_loss")
        if len(validation):
            label = f"{label}: validation {validation[-1]:.3f}"
        axes.plot(tokens, smoothed[-1], color=colour, linewidth=1.8, label=label)
        axes.plot(seen_at, validation, "o", color=colour, markersize=5, markeredgecolor="white", clip_on=False)
    dress(axes, "Learning curves: smoothed training loss, validation as dots", "loss (nats per token)", pad=8)
    # the first steps of a fresh model fall from ln(vocabulary); they would flatten all that is worth comparing
    limit_to(axes, [value for curve in smoothed for value in curve[len(curve) // 20 :]])
    axes.set_xlim(left=0)
    axes.set_xlabel("training tokens", fontsize=FONT_SIZE)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=FONT_SIZE)
    return save_figure(figure, Path(out))


def _draw_saliency(
    axes: Axes, metrics: Sequence[Record], events: Sequence[Record], source: Mapping[str, float]
) -> None:
    for name, (colour, line, _) in TYPE_STYLES.items():
        points = [(record["tokens"], (record.get("saliency") or {}).get(name)) for record in metrics]
        chosen = [(e["tokens"], e.get("damage_per_parameter")) for e in events if e.get("type") == name]
        tokens, damage = positive(points)
        event_tokens, event_damage = positive(chosen)
        label = _type_label(name, source)
        if len(tokens):
            dots = "." if len(tokens) < 20 else ""  # a line through one point is invisible
            axes.plot(tokens, damage, color=colour, linestyle=line, marker=dots, linewidth=1.4, label=label)
        if len(event_tokens):
            shown = None if len(tokens) else label
            axes.plot(event_tokens, event_damage, "|", color=colour, markersize=6, alpha=0.6, label=shown)
    axes.set_yscale("log")
    dress(axes, "Saliency: predicted damage of each type's next event (ticks: events taken)", "nats per parameter")
    legend_above(axes)


def _draw_ratio(axes: Axes, metrics: Sequence[Record], source: Mapping[str, float]) -> None:
    rows = [(record["tokens"], _type_widths(record["widths"])) for record in metrics if "widths" in record]
    highest = 0.01
    for name, (colour, line, _) in TYPE_STYLES.items():
        if name not in source or (name == "attention_query" and source[name] == 1.0):
            continue
        if name == "depth" and all(widths[name] == source[name] for _, widths in rows):
            continue  # layers fall only where the recipe asks for it
        tokens, ratio = columns([(0.0, 0.0), *((at, 1.0 - widths[name] / source[name]) for at, widths in rows)])
        label = _type_label(name, source)
        axes.plot(tokens, ratio, color=colour, linestyle=line, linewidth=1.8, drawstyle="steps-post", label=label)
        highest = max(highest, *ratio)
    dress(axes, "Pruning ratio of each type", "pruned share of the width")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.03 * highest, 1.06 * highest)
    legend_above(axes)


def _share_tokens(saliency: Axes, ratio: Axes, size: Axes, *, pruned_at: Sequence[float]) -> None:
    """Give the panels one token axis; if pruning is a small part of it, show that part larger in the upper two."""
    end = size.get_xlim()[1]
    begin, stop = min(pruned_at, default=0.0), max(pruned_at, default=0.0)
    zoomed = 0.0 < stop < end / 2
    for axes in (saliency, ratio):
        axes.set_xlim(0, stop * 1.06 if zoomed else end)
    for axes in (saliency, ratio, size):
        axes.axvspan(begin, stop, color=PHASE_COLOUR, zorder=0, linewidth=0)
    saliency.tick_params(labelbottom=False)
    if zoomed:
        ratio.set_xlabel("training tokens, pruning phase only (shaded below)", fontsize=FONT_SIZE)
    else:
        ratio.tick_params(labelbottom=False)


def _draw_loss(axes: Axes, metrics: Sequence[Record], compactions: Sequence[Record]) -> Axes:
    """Draw loss and size; return the axes of the size, which lie behind."""
    tokens, losses = series(metrics, "loss")
    smoothed = smooth(losses)
    seen_at, validation = series(metrics, "validation_loss")
    axes.plot(tokens, losses, color="#B0B0B0", linewidth=0.6, alpha=0.6)
    axes.plot(tokens, smoothed, color=LOSS_COLOUR, linewidth=1.6, label="training loss (smoothed)")
    if len(validation):
        dots: dict[str, Any] = {
            "color": VALIDATION_COLOUR,
            "markeredgecolor": "black",
            "markersize": 6,
            "linestyle": "none",
        }
        axes.plot(seen_at, validation, marker="o", label="validation loss", clip_on=False, zorder=4, **dots)
    dress(axes, "Loss and size", "loss (nats per token)")
    axes.set_xlabel("training tokens", fontsize=FONT_SIZE)
    settled = len(losses) // 50
    spread = np.quantile(losses[settled:], [0.02, 0.98]) if len(losses) else []
    limit_to(axes, [*smoothed[settled:], *spread, *validation])
    size = axes.twinx()
    _draw_size(size, metrics, compactions)
    handles = [*axes.get_legend_handles_labels()[0], *size.get_legend_handles_labels()[0]]
    legend_above(axes, handles)
    # the size lies behind the loss, and the loss panel's own background must not cover it
    axes.set_zorder(size.get_zorder() + 1)
    axes.patch.set_visible(False)
    return size


def _draw_size(axes: Axes, metrics: Sequence[Record], compactions: Sequence[Record]) -> None:
    lines: dict[str, Any] = {"live": "-", "allocated": (0, (3, 1.5))}
    for word, line in lines.items():
        tokens, parameters = series(metrics, f"{word}_parameters")
        style = {"color": SIZE_COLOUR, "linestyle": line, "linewidth": 1.6, "drawstyle": "steps-post"}
        if len(tokens):
            axes.plot(tokens, parameters, label=f"{word} parameters", **style)
    if compactions:
        tokens, parameters = series(compactions, "allocated_after")
        axes.plot(tokens, parameters, "v", color=SIZE_COLOUR, markeredgecolor="#7A5200", label="compaction")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("parameters", fontsize=FONT_SIZE, color="#8A5F00")
    axes.tick_params(axis="y", labelsize=FONT_SIZE - 1, labelcolor="#8A5F00", color="#8A5F00")
    axes.yaxis.set_major_formatter(FuncFormatter(count_label))
    for side in ("top", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _metrics(run_dir: Path) -> list[Record]:
    """Return the records of metrics.jsonl that say how many tokens were seen."""
    metrics: list[Record] = [record for record in read_journal(run_dir / "metrics.jsonl") if "tokens" in record]
    if not metrics:
        raise UsageError(f"{run_dir} has no metrics.jsonl with records: give the folder of a run that has started")
    return metrics


def _source_widths(run_dir: Path, records: Iterable[Record]) -> dict[str, float]:
    """Return the source's width of each pruning type: from summary.json, or for a run under way the largest seen."""
    seen = [_type_widths(record["widths"]) for record in records if "widths" in record]
    summary = run_dir / "summary.json"
    if seen and summary.is_file():
        seen.append(_type_widths(json.loads(summary.read_text(encoding="utf-8"))["source"]["widths"]))
    return {name: max(widths[name] for widths in seen) for name in TYPE_STYLES} if seen else {}


def _type_label(name: str, source: Mapping[str, float]) -> str:
    """Without grouped queries a KV group is an ordinary head."""
    ungrouped = name == "attention" and source.get("attention_query") == 1.0
    return "attention (heads)" if ungrouped else TYPE_STYLES[name][2]


def _type_widths(widths: Mapping[str, int]) -> dict[str, float]:
    return {
        "attention": widths["kv_heads"],
        "attention_query": widths["heads"] / widths["kv_heads"],
        "ffn": widths["intermediate"],
        "stem": widths["hidden"],
        "depth": widths["layers"],
    }
