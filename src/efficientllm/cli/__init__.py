"""The command line: argv in, one sentence or a result out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

from collections.abc import Sequence

from typer.models import CommandInfo

from efficientllm import __version__
from efficientllm.cli import bench, compare, evaluate, export, plan, runs, saliency  # noqa: F401  each module adds its commands
from efficientllm.cli.app import app

# Commands by use, in the order in which `--help` lists them.
PANELS = {
    "Start here": ("demo", "keys", "plan"),
    "Train": ("prune", "train", "continue"),
    "Is it better?": ("report", "compare", "eval", "bench"),
    "Deliver": ("export",),
    "More": ("criteria", "probe", "version"),
}


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _by_use() -> None:
    """Sorts the commands into PANELS, which must name every one of them."""
    places = [(name, panel) for panel, names in PANELS.items() for name in names]
    order, panels = {name: place for place, (name, _) in enumerate(places)}, dict(places)
    app.registered_commands.sort(key=lambda command: order[_name_of(command)])
    for command in app.registered_commands:
        command.rich_help_panel = panels[_name_of(command)]


def _name_of(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__


_by_use()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0 done, 2 something the user can mend, 75 a hung rank, 130 or 143 stopped by a signal."""
    app(args=argv, standalone_mode=True)
