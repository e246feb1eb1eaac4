"""The command line: argv in, one sentence or a result out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

from collections.abc import Sequence

from efficientllm import __version__
from efficientllm.cli import bench, compare, evaluate, export, keys, plan, report, runs, saliency  # noqa: F401  each module adds its commands
from efficientllm.cli.app import app


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0 done, 2 something the user can mend, 130 or 143 stopped by a signal."""
    app(args=argv, standalone_mode=True)
