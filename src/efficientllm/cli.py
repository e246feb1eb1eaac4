"""The command line: argv in, one sentence or a result out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from efficientllm import __version__
from efficientllm.errors import UsageError

USAGE_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a good language model into a better small one: pretraining, architecture design and pruning in one run.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; see recipes/ for commented ones.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Replaces keys of the recipe, e.g. train.lr=1e-3"),
]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns what the user can mend, or has asked for, into a sentence and an exit code."""
    from efficientllm.jobs.interruption import Interrupted

    try:
        yield
    except UsageError as error:
        say(f"error: {error}")
        raise SystemExit(USAGE_ERROR) from None
    except Interrupted as stop:
        say(str(stop))
        raise SystemExit(128 + stop.signum) from None
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise SystemExit(130) from None


@app.command()
@one_sentence()
def prune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Prune a source model while it keeps training. The same command goes on with an interrupted run."""
    from efficientllm.config import load_recipe
    from efficientllm.jobs.prune import run

    loaded = load_recipe(recipe, overrides or [])
    if loaded.prune is None:
        raise UsageError(f"{recipe} has no prune section; add one with a target, or use `efficientllm train`")
    print(run(loaded, say)["result"]["path"])


@app.command()
@one_sentence()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train without pruning: continued pretraining, or from scratch with `init: random`; `prune` must be absent."""
    from efficientllm.config import load_recipe
    from efficientllm.jobs.prune import run

    loaded = load_recipe(recipe, overrides or [])
    if loaded.prune is not None:
        raise UsageError(f"{recipe} has a prune section; remove it (or set prune=null), or use `efficientllm prune`")
    print(run(loaded, say)["result"]["path"])


@app.command(name="continue")
@one_sentence()
def go_on(
    snapshot: Annotated[Path, typer.Argument(metavar="SNAPSHOT", help="A folder that a ladder left: RUN/ladder/469M.")],
    overrides: Overrides = None,
) -> None:
    """Train on at the size of a ladder's snapshot, from its weights and moments, to the end of the original run."""
    from efficientllm.jobs.ladder import recipe_of
    from efficientllm.jobs.prune import run

    print(run(recipe_of(snapshot, overrides or []), say)["result"]["path"])


@app.command()
@one_sentence()
def probe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A transformers folder or hub id.")],
    data: Annotated[
        list[str], typer.Option("--data", help="Text: parquet, jsonl, txt, folder or hub id; may be given twice.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for probe.json and probe.png.")] = Path("probe"),
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    units: Annotated[int, typer.Option(min=2, help="Units sampled of each type.")] = 24,
    batches: Annotated[int, typer.Option(min=1, help="Batches that the scores are averaged over.")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 256,
    depth: Annotated[bool, typer.Option("--depth", help="Whole layers too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
) -> None:
    """Measure how well every criterion predicts what removing a unit of this model really costs."""
    from efficientllm.jobs.probe import ProbeRequest, run_probe
    from efficientllm.pruning.groups import DEFAULT_TYPES, PRUNING_TYPES
    from efficientllm.reporting.tables import print_probe

    result = run_probe(
        ProbeRequest(
            model,
            data,
            out,
            text_column,
            PRUNING_TYPES if depth else DEFAULT_TYPES,
            units,
            batches,
            rows,
            sequence_length,
            seed=seed,
        ),
        say,
    )
    print_probe(result["criteria"])
    say(f"{out / 'probe.json'}, {out / 'probe.png'}")


@app.command()
def criteria() -> None:
    """List the saliency criteria: what each looks at, what it costs, and the paper it is from."""
    from efficientllm.reporting.tables import print_criteria

    print_criteria()


@app.command()
@one_sentence()
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where the demo keeps its runs.")] = Path("runs/demo"),
) -> None:
    """The whole story in minutes on two CPU cores, without downloads: source, compact model, from-scratch control."""
    from efficientllm.demo.story import run_demo

    run_demo(folder, say)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0 done, 2 something the user can mend, 130 or 143 stopped by a signal."""
    app(args=argv, standalone_mode=True)


if __name__ == "__main__":
    main()
