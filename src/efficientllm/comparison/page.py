"""The Markdown page of a comparison: tables with their settings, what is resolved, what is not, what failed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from efficientllm.comparison.arms import parse_arm
from efficientllm.comparison.equal_flops import CLOSE
from efficientllm.comparison.rates import FACTOR, MORE
from efficientllm.reporting.tables import markdown, rows_of
from efficientllm.sizes import format_count

TITLES = {
    "tokens": "Equal training tokens",
    "flops": "Equal training FLOPs",
    "pipeline": "Equal FLOPs of the whole pipeline, the source's own pretraining counted",
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
    further = f", going on by factors of {FACTOR:g} while the best lies at an edge, {MORE} times each way at most,"
    further = further if len(settings["lr_grid"]) > 1 else ""
    yield (
        f"Source: {format_count(source['parameters'])} parameters, validation loss {source['validation_loss']:.4f}. "
        f"Seeds: {seeds}. Every arm of a seed reads the same batches in the same order and is measured on the same "
        f"validation windows. Peak learning rate: the best of {grid} times the recipe's{further} for each arm by the "
        "loss of its run with the first seed at equal tokens on every other validation window; other seeds and budgets "
        "use that rate. All losses of arms below are on the windows that no rate was chosen on; the source's and the "
        "learning curves are on all of them."
    )
    yield ""
    yield (
        "FLOPs are those of training: steps, refreshed scores, corrections, the teacher's forward pass. "
        f"An arm meets a budget of FLOPs within {CLOSE:.0%}, or no claim is made about it. "
        "Difference: loss minus the loop's, with a 95 % interval, paired; bold where it excludes zero. Corrected for "
        "several comparisons is what is claimed below each table, with all of its differences tested together (Holm, "
        "5 %). An arm that is best at the edge of the tried rates may be better still beyond it."
    )
    yield from ("", *_reach(results))
    for budget, arms in results["budgets"].items():
        yield from ("", f"## {TITLES[budget]}", "")
        yield from _table(arms)
        yield from _tasks(arms)
        yield from _problems(arms)
        yield from ("", *_verdict(arms))
    yield from ("", "## Loss by peak learning rate", "", *_rates(results["budgets"]["tokens"]))
    for title, name in pictures.items():
        yield from ("", f"![{title}]({name})")
    if results["structure"]:
        yield from ("", "## Is the structure stable over seeds?", "")
        yield from _structure(results)
    yield from (
        "",
        "## Recipe",
        "",
        "As it was given. Arms set seed, rate, tokens, mode and shape by themselves, and correct or distil only where "
        "their names say so.",
    )
    yield from ("", "```yaml", settings["recipe"].rstrip(), "```", "")
    yield f"efficientllm {settings['efficientllm']}, torch {settings['torch']}, transformers {settings['transformers']}"


def _reach(results: Mapping[str, Any]) -> Iterator[str]:
    """What the figures do not say by themselves."""
    seeds = len(results["settings"]["seeds"])
    yield (
        "An interval over seeds speaks of other orders of the batches (and, where an arm starts from fresh weights, of "
        "other weights), from this one source and on this one validation text. The first seed's runs stand in it "
        "although rates were chosen among them, on other windows."
        if seeds > 1
        else "With one seed an interval speaks of other windows of this validation text, not of other runs."
    )
    borrowed = [name for name in results["settings"]["arms"] if parse_arm(name).needs_loop]
    if borrowed:
        names = ", ".join(f"`{name}`" for name in borrowed)
        yield (
            f"A loop has found the shape (of `fixed`: the size) that {names} were given; its FLOPs are not on their "
            "bills."
        )


def _table(arms: Mapping[str, Any]) -> Iterator[str]:
    limited = any(run["budget_spent"] is not None for arm in arms.values() for run in arm["runs"].values())
    yield markdown(rows_of(_row(name, arm, limited) for name, arm in arms.items() if arm["runs"]))


def _row(name: str, arm: Mapping[str, Any], limited: bool) -> dict[str, str]:
    """limited: whether there is a budget of FLOPs."""
    runs, mean = list(arm["runs"].values()), arm["mean"]
    sizes = sorted({run["parameters"] for run in runs})
    row = {
        "arm": name,
        "parameters": " to ".join(dict.fromkeys(format_count(each) for each in (sizes[0], sizes[-1]))),
        "rate": f"{arm['lr']:.3g}",
        "loss": f"{mean['loss']:.4f}" + ("" if arm["spread"] is None else f" ± {arm['spread']:.4f}"),
        "bits per byte": f"{mean['bits_per_byte']:.4f}",
        "perplexity": f"{mean['perplexity']:.2f}",
        "difference to the loop": difference_cell(arm["difference"]),
        "tokens": format_count(round(mean["tokens"])),
        "FLOPs": f"{mean['flops']:.3g}" + (f" + {arm['inherited_flops']:.3g}" if arm["inherited_flops"] else ""),
    }
    row |= {"FLOPs / budget": _shares(runs)} if limited else {}
    return row | {
        "seconds": f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
        "peak memory": f"{max(run['peak_memory_bytes'] for run in runs) / 2**20:,.0f} MiB",
    }


def _shares(runs: Iterable[Mapping[str, Any]]) -> str:
    """What the seeds spent of their budgets, from the least to the most; the loop's is the budget itself."""
    shares = sorted(run["budget_spent"] or 1.0 for run in runs)
    return " to ".join(dict.fromkeys(f"{share:.3f}" for share in (shares[0], shares[-1])))


def _rates(arms: Mapping[str, Any]) -> Iterator[str]:
    """Loss with the first seed on the windows that rates are chosen on, by rate; the best in bold."""
    rates = sorted({float(lr) for arm in arms.values() for lr in arm["losses_by_lr"]})
    rows = [["arm", *(f"{lr:g}" for lr in rates)]]
    for name, arm in arms.items():
        losses = {float(lr): loss for lr, loss in arm["losses_by_lr"].items()}
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        cells = []
        for lr in rates:
            loss = losses.get(lr)
            text = "failed" if lr in losses and loss is None else "-" if loss is None else f"{loss:.4f}"
            cells.append(f"**{text}**" if loss is not None and loss == best else text)
        rows.append([name, *cells])
    yield markdown(rows)


def _tasks(arms: Mapping[str, Any]) -> Iterator[str]:
    """Accuracy in percent, mean over seeds, with the difference to the loop in points where it has an interval."""
    tasks = list(dict.fromkeys(task for arm in arms.values() for task in [*arm["tasks"], *arm["task_problems"]]))
    if not tasks:
        return
    rows = [["arm", *tasks]]
    for name, arm in arms.items():
        cells = []
        if not arm["runs"]:
            continue
        for task in tasks:
            found = arm["tasks"].get(task)
            difference = found["difference"] if found else None
            points = {key: 100 * difference[key] for key in ("mean", "low", "high")} if difference else None
            text = "-" if found is None else f"{100 * found['mean']:.2f}"
            if points and difference:
                text += " " + "({mean:+.2f}: {low:+.2f} to {high:+.2f})".format(**points)
                text = f"**{text}**" if difference["resolved"] else text
            cells.append(text)
        rows.append([name, *cells])
    yield from ("", markdown(rows))
    for name, arm in arms.items():
        for task, why in arm["task_problems"].items():
            yield from ("", f"`{name}` is not measured on {task}: {why}")


def difference_cell(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "-"
    text = f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
    text = f"**{text}**" if difference["resolved"] else text
    return f"{text}, over windows of one seed" if difference["over"] == "windows" else text


def _problems(arms: Mapping[str, Any]) -> Iterator[str]:
    for name, arm in arms.items():
        if arm["problem"]:
            yield from ("", f"No claim about `{name}`: {arm['problem']}")


def _verdict(arms: Mapping[str, Any]) -> Iterator[str]:
    """Claims, each with its interval and what weakens it; what is not resolved is said to be so."""
    differences = {name: arm["difference"] for name, arm in arms.items() if arm["difference"]}
    words = {
        "Better than the loop": lambda d: d["high"] < 0,
        "Worse than the loop": lambda d: d["low"] > 0,
        "Not told apart from the loop": lambda d: not d["resolved"],
    }
    for title, holds in words.items():
        for name, each in differences.items():
            if holds(each):
                among = f"; {_among(each, len(differences))}" if each["resolved"] else ""
                yield f"* {title}: `{name}` {difference_cell(each)}{among}{_edge_remark(name, arms)}."


def _among(difference: Mapping[str, Any], count: int) -> str:
    if count < 2:
        return "the only comparison of this table"
    holds = "holds" if difference["survives"] else "does not hold"
    return f"{holds} after correction for {count} comparisons"


def _edge_remark(name: str, arms: Mapping[str, Any]) -> str:
    edge = [each for each in dict.fromkeys((name, "loop")) if each in arms and at_edge(arms[each])]
    who = " and ".join(f"`{each}`" for each in edge)
    return f"; {who} best at the edge of the tried rates" if edge else ""


def at_edge(arm: Mapping[str, Any]) -> bool:
    """Whether the best learning rate is the lowest or the highest of those tried."""
    rates = [float(lr) for lr in arm["losses_by_lr"]]
    return len(rates) > 1 and bool(arm["lr"]) and any(math.isclose(arm["lr"], end) for end in (min(rates), max(rates)))


def _structure(results: Mapping[str, Any]) -> Iterator[str]:
    yield "Jaccard index of the units that two seeds keep, mean over pairs and layers; in brackets: by chance."
    yield ""
    kinds = list(dict.fromkeys(kind for arm in results["structure"].values() for kind in arm["overlap"]))
    of_shapes = ["widths by seed (FFN/heads/hidden)", "their spread", "loss by seed", "do two shapes differ in loss?"]
    rows = [["arm", *kinds, *of_shapes]]
    for name, arm in results["structure"].items():
        found = arm["overlap"]
        cells = [
            f"{each['jaccard']:.2f} ({each['chance']:.2f})" if (each := found.get(kind)) else "-" for kind in kinds
        ]
        runs = results["budgets"]["tokens"][name]["runs"].values()
        cells.append(", ".join(_widths_cell(run["widths"]) for run in runs))
        cells.append(_widths_cell(arm["spread"]))
        cells.append(", ".join(f"{run['loss']:.3f}" for run in runs))
        rows.append([name, *cells, "cannot be said" if arm["shapes"] is None else difference_cell(arm["shapes"])])
    yield markdown(rows)
    if all(arm["shapes"] is None for arm in results["structure"].values()):
        yield from (
            "",
            "Whether different shapes end at different losses cannot be said: that takes two seeds of each.",
        )


def _widths_cell(widths: Mapping[str, int]) -> str:
    """Of a mixture of experts the FFN is experts x their channels."""
    ffn = "{intermediate}" if "intermediate" in widths else "{experts}x{expert_intermediate}"
    return (ffn + "/{heads}/{hidden}").format(**widths)
