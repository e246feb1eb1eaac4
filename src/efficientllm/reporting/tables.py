"""Tables for the terminal, and plain when they are piped."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 160


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
