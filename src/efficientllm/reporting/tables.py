"""Tables for the terminal, and plain when they are piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from efficientllm.reporting.templates import rendered

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


def print_rows(rows: Sequence[Sequence[str]], title: str | None = None, *, figures: bool = False) -> None:
    """The first row is the head. figures: whether all columns but the first hold them, which stand to the right."""
    table = Table(box=box.SIMPLE, title=title)
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if figures and place else "left")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
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


def rows_of(records: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """A table of records that all have the same keys, which are its head."""
    found = list(records)
    return [list(found[0]), *(list(each.values()) for each in found)] if found else []


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head. "" without rows."""
    if not rows:
        return ""
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
    groups: dict[str, list[tuple[str, str, str]]] = {"At the top": []}
    for name, default, meaning, choices in rows:
        group = name.split(".")[0].removesuffix("[]") if "." in name else "At the top"
        cell = f"`{default}`" if default and default != "required" else default
        groups.setdefault(group, []).append((name, cell, _with_choices(meaning, choices).replace("||", "\\|\\|")))
    return rendered("keys.md", groups={group: own for group, own in groups.items() if own}, gone=gone)


def _with_choices(meaning: str, choices: tuple[str, ...]) -> str:
    """The choices are listed where the sentence does not name them all itself."""
    if all(choice in meaning for choice in choices):
        return meaning
    return f"{meaning}. One of: {', '.join(choices)}"
