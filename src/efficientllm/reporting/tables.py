"""Tables for the terminal, and plain when they are piped."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPED_WIDTH = 160
WIDTH_LABELS = {  # of a shape's record (Widths.record), in the order in which reports and cards show them
    "layers": "layers",
    "hidden": "hidden size",
    "heads": "query heads",
    "kv_heads": "KV heads",
    "intermediate": "FFN channels",
}
EXPERT_LABELS = {"experts": "experts", "expert_intermediate": "FFN channels of an expert"}  # in its place


def console() -> Console:
    """Stdout: as wide as the terminal, or wide enough for any table of ours in a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def print_criteria() -> None:
    from efficientllm.pruning.criteria import CRITERIA

    table = Table(box=box.SIMPLE)
    for name in ("prune.saliency", "score of a unit", "looks at", "cost", "paper"):
        table.add_column(name)
    for each in CRITERIA.values():
        looks = "nothing" if each.needs == "nothing" else " and ".join({"weights": None, each.needs: None})
        table.add_row(each.name, each.about, looks, each.cost, each.source)
    console().print(table)
    console().print(
        "In the loop on a model of 1 M parameters flap and sparsegpt ended no better than random (three seeds, "
        "docs/results/ablations.md); efficientllm probe measures them all on yours."
    )


def print_probe(criteria: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Rank correlation with the true loss increase, and scale, of every criterion within each type and over all."""
    groups = list(next(iter(criteria.values())))
    table = Table(box=box.SIMPLE, title="rank correlation with the true loss increase, and (scale: score / truth)")
    table.add_column("prune.saliency")
    for group in groups:
        table.add_column(group, justify="right")
    for name, verdict in criteria.items():
        cells = [f"{verdict[group]['rank_correlation']:.2f} ({verdict[group]['scale']:.3g})" for group in groups]
        table.add_row(name, *cells)
    console().print(table)


def flops_sentence(parts: Mapping[str, float | None]) -> str:
    """All operations and each part's share of them, parts without any left out. parts: `flops_by_part` of a summary or
    of a plan; where one of them is not known, neither is the sum."""
    known = [value for value in parts.values() if value is not None and value == value]
    if len(known) < len(parts):
        return "FLOPs unknown"
    total = sum(known)
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in parts.items() if value)
    return f"{total:.3g} FLOPs ({shares})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


KeyRow = tuple[str, str, str, tuple[str, ...]]  # dotted name, default, meaning, choices


def print_keys(rows: Sequence[KeyRow]) -> None:
    table = Table(box=box.SIMPLE)
    table.add_column("key", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("meaning", ratio=1)
    for name, default, meaning, choices in rows:
        table.add_row(escape(name), escape(default), escape(_with_choices(meaning, choices)))
    console().print(table)


def keys_page(rows: Sequence[KeyRow], gone: Mapping[str, str]) -> str:
    """The reference of recipe keys in Markdown: a table for the keys at the top, and one for each section. gone: keys
    that there are no longer, and what to do instead."""
    groups: dict[str, list[KeyRow]] = {}
    for row in rows:
        groups.setdefault(row[0].split(".")[0].removesuffix("[]") if "." in row[0] else "", []).append(row)
    lines = [
        "# Keys of a recipe",
        "",
        "What `efficientllm keys --markdown` prints. Sizes read as `469M`, `74B` or `32K`; places in the run as tokens "
        "or percent of",
        "`train.tokens`; null restores the default. A key that is unknown, or without effect beside the others, is "
        "refused.",
    ]
    for group, own in sorted(groups.items(), key=lambda item: item[0] != ""):
        lines += [
            "",
            f"## {group}" if group else "## At the top",
            "",
            "| key | default | meaning |",
            "| --- | --- | --- |",
        ]
        for name, default, meaning, choices in own:
            cell = f"`{default}`" if default and default != "required" else default
            lines.append(f"| `{name}` | {cell} | {_with_choices(meaning, choices)} |".replace("||", "\\|\\|"))
    lines += ["", "## Keys that went", "", "A recipe that still has one is refused with its sentence.", ""]
    lines += [f"* `{name}`: {instead}." for name, instead in gone.items()]
    return "\n".join(lines) + "\n"


def _with_choices(meaning: str, choices: tuple[str, ...]) -> str:
    """The choices are listed where the sentence does not name them all itself."""
    if all(choice in meaning for choice in choices):
        return meaning
    return f"{meaning}. One of: {', '.join(choices)}"
