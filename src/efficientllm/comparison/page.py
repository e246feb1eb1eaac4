"""The Markdown page of a comparison: tables with their settings, what is resolved, what is not, what failed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from efficientllm.sizes import format_count

TITLES = {
    "tokens": "Equal training tokens",
    "flops": "Equal training FLOPs",
    "pipeline": "Equal FLOPs of the whole pipeline, the source's own pretraining counted for scratch",
}


def page(results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Markdown. pictures: title -> file name beside the page."""
    return "\n".join(_lines(results, pictures)) + "\n"


def _lines(results: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[str]:
    settings, source = results["settings"], results["source"]
    yield "# Comparison at equal budgets"
    yield ""
    seeds = ", ".join(map(str, settings["seeds"]))
    grid = ", ".join(f"{scale:g}" for scale in settings["lr_grid"])
    yield (
        f"Source: {format_count(source['parameters'])} parameters, validation loss {source['validation_loss']:.4f}. "
        f"Seeds: {seeds}. Every arm of a seed reads the same batches in the same order and is measured on the same "
        f"validation windows. Peak learning rate: the best of {grid} times the recipe's, for each arm by the "
        "validation loss of its run with the first seed at equal tokens; other seeds and budgets use that rate."
    )
    yield ""
    yield (
        "FLOPs are those of training: steps, calibration, refreshed scores, corrections, the teacher's forward pass. "
        "Difference: loss minus the loop's, with a 95 % interval, paired; bold where it excludes zero."
    )
    for budget, arms in results["budgets"].items():
        yield from ("", f"## {TITLES[budget]}", "")
        yield from _table(arms)
        yield from _tasks(arms)
        yield from _problems(arms)
        yield from ("", *_verdict(arms))
    for title, name in pictures.items():
        yield from ("", f"![{title}]({name})")
    if results["structure"]:
        yield from ("", "## Is the structure stable over seeds?", "")
        yield from _structure(results)
    yield from ("", "## Recipe", "", "```yaml", settings["recipe"].rstrip(), "```", "")
    yield f"efficientllm {settings['efficientllm']}, torch {settings['torch']}, transformers {settings['transformers']}"


def _table(arms: Mapping[str, Any]) -> Iterator[str]:
    names = "arm, parameters, rate, loss, bits per byte, perplexity, difference to the loop, tokens, FLOPs, seconds"
    columns = [*names.split(", "), "peak memory"]
    yield f"| {' | '.join(columns)} |"
    yield "| " + " | ".join(["---"] * len(columns)) + " |"
    for name, arm in arms.items():
        runs = list(arm["runs"].values())
        if not runs:
            continue
        spread = "" if arm["spread"] is None else f" ± {arm['spread']:.4f}"
        sizes = sorted({run["parameters"] for run in runs})
        size = " to ".join(dict.fromkeys(format_count(each) for each in (sizes[0], sizes[-1])))
        mean = arm["mean"]
        cells = [
            name,
            size,
            f"{arm['lr']:.3g}",
            f"{mean['loss']:.4f}{spread}",
            f"{mean['bits_per_byte']:.4f}",
            f"{mean['perplexity']:.2f}",
            difference_cell(arm["difference"]),
            format_count(round(mean["tokens"])),
            f"{mean['flops']:.3g}",
            f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
            f"{max(run['peak_memory_bytes'] for run in runs) / 2**20:,.0f} MiB",
        ]
        yield f"| {' | '.join(cells)} |"


def _tasks(arms: Mapping[str, Any]) -> Iterator[str]:
    """Accuracy in percent, mean over seeds, with the difference to the loop in points where it has an interval."""
    tasks = list(dict.fromkeys(task for arm in arms.values() for task in arm["tasks"]))
    if not tasks:
        return
    yield from ("", f"| arm | {' | '.join(tasks)} |", "| --- | " + " | ".join(["---"] * len(tasks)) + " |")
    for name, arm in arms.items():
        cells = []
        for task in tasks:
            found = arm["tasks"].get(task)
            difference = found["difference"] if found else None
            points = {key: 100 * difference[key] for key in ("mean", "low", "high")} if difference else None
            text = "-" if found is None else f"{100 * found['mean']:.2f}"
            if points and difference:
                text += " " + "({mean:+.2f}: {low:+.2f} to {high:+.2f})".format(**points)
                text = f"**{text}**" if difference["resolved"] else text
            cells.append(text)
        yield f"| {name} | {' | '.join(cells)} |"


def difference_cell(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "-"
    text = f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
    text = f"**{text}**" if difference["resolved"] else text
    return text if difference["over"] == "seeds" else f"{text}, over windows of one seed"


def _problems(arms: Mapping[str, Any]) -> Iterator[str]:
    for name, arm in arms.items():
        if arm["problem"]:
            yield from ("", f"`{name}` is incomplete: {arm['problem']}")


def _verdict(arms: Mapping[str, Any]) -> Iterator[str]:
    """Claims, each with its interval; what is not resolved is said to be so."""
    differences = {name: arm["difference"] for name, arm in arms.items() if arm["difference"]}
    words = {
        "Better than the loop": lambda d: d["high"] < 0,
        "Worse than the loop": lambda d: d["low"] > 0,
        "Not told apart from the loop": lambda d: not d["resolved"],
    }
    for title, holds in words.items():
        claims = [f"`{name}` {difference_cell(each)}" for name, each in differences.items() if holds(each)]
        if claims:
            yield f"* {title}: {'; '.join(claims)}."
    edge = [name for name, arm in arms.items() if at_edge(arm)]
    if edge:
        names = ", ".join(f"`{name}`" for name in edge)
        yield f"* Best at the edge of the tried rates, so perhaps better still beyond it: {names}."


def at_edge(arm: Mapping[str, Any]) -> bool:
    """Whether the best learning rate is the lowest or the highest of those tried."""
    rates = [float(lr) for lr in arm["losses_by_lr"]]
    return len(rates) > 1 and bool(arm["lr"]) and any(math.isclose(arm["lr"], end) for end in (min(rates), max(rates)))


def _structure(results: Mapping[str, Any]) -> Iterator[str]:
    yield "Jaccard index of the units that two seeds keep, mean over pairs and layers; in brackets: by chance."
    yield ""
    kinds = list(dict.fromkeys(kind for arm in results["structure"].values() for kind in arm))
    yield f"| arm | {' | '.join(kinds)} | widths by seed (FFN/heads/hidden) | loss by seed |"
    yield "| --- | " + " | ".join(["---"] * len(kinds)) + " | --- | --- |"
    for name, arm in results["structure"].items():
        cells = [f"{arm[kind]['jaccard']:.2f} ({arm[kind]['chance']:.2f})" if kind in arm else "-" for kind in kinds]
        runs = results["budgets"]["tokens"][name]["runs"].values()
        widths = ", ".join("{intermediate}/{heads}/{hidden}".format(**run["widths"]) for run in runs)
        losses = ", ".join(f"{run['loss']:.3f}" for run in runs)
        yield f"| {name} | {' | '.join(cells)} | {widths} | {losses} |"
