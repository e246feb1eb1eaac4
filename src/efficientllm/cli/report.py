"""The command that shows runs: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficientllm.cli.app import app, one_sentence, say
from efficientllm.errors import UsageError


@app.command()
@one_sentence()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are overlaid.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the page; default: the first run's.")] = None,
    samples: Annotated[bool, typer.Option(help="Let source and result write; loads both models, once.")] = True,
) -> None:
    """One HTML page of a run, or of several, with its plots as SVG and PNG beside it; for runs under way too."""
    from efficientllm.jobs.report import write_report

    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice: name each once")
    print(write_report(runs, out or runs[0], say, samples=samples))
