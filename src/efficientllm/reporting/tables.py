"""Tables for the terminal, and plain when they are piped."""

from __future__ import annotations

import sys

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
