"""Commands that train, and the one that shows what came of it: prune, train, continue, demo, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficientllm.cli.app import Overrides, RecipeFile, app, one_sentence, say
from efficientllm.errors import UsageError

if TYPE_CHECKING:
    from efficientllm.config import Recipe


@app.command()
@one_sentence()
def prune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Prune a source model while it keeps training. The same command goes on with an interrupted run.

    The result is an ordinary transformers folder, RUN.DIR/model; its path is printed once it is there.

    Several GPUs: torchrun --nproc-per-node 8 -m efficientllm prune RECIPE.yaml
    """

    def read() -> Recipe:
        from efficientllm.config import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        if loaded.prune is None:
            raise UsageError(f"{recipe} has no prune section; add one with a target, or use `efficientllm train`")
        return loaded

    _run(read)


@app.command()
@one_sentence()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train without pruning: continued pretraining, or from scratch with `init: random`; `prune` must be absent."""

    def read() -> Recipe:
        from efficientllm.config import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        if loaded.prune is not None:
            raise UsageError(
                f"{recipe} has a prune section; remove it (or set prune=null), or use `efficientllm prune`"
            )
        return loaded

    _run(read)


@app.command(name="continue")
@one_sentence()
def go_on(
    snapshot: Annotated[Path, typer.Argument(metavar="SNAPSHOT", help="A folder that a ladder left: RUN/ladder/469M.")],
    overrides: Overrides = None,
) -> None:
    """Train on at the size of a ladder's snapshot, from its weights and moments, to the end of the original run."""
    from efficientllm.jobs.ladder import recipe_of

    _run(lambda: recipe_of(snapshot, overrides or []))


@app.command()
@one_sentence()
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where the demo keeps its runs.")] = Path("runs/demo"),
) -> None:
    """The whole story in minutes on two CPU cores, without downloads: source, compact model, from-scratch control."""
    from efficientllm.demo.story import run_demo
    from efficientllm.jobs.report import write_report

    run_demo(folder, say)
    say(f"report: {write_report([folder / 'compact', folder / 'scratch'], folder, say)}")


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


def _run(read: Callable[[], Recipe]) -> None:
    """Runs a recipe, prints where the result is, and leaves a report beside it: on one process, or on torchrun's."""
    from efficientllm.distributed.launch import joined
    from efficientllm.jobs.prune import run
    from efficientllm.jobs.report import report_after

    with joined() as ranks:
        recipe = ranks.together(read)
        path = run(recipe, say, ranks)["result"]["path"]
        if ranks.leads:
            report_after(recipe, say)
            print(path)
