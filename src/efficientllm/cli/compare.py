"""The command that compares: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficientllm.cli.app import Overrides, RecipeFile, app, one_sentence, say
from efficientllm.errors import UsageError
from efficientllm.sizes import parse_count


@app.command()
@one_sentence()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    arms: Annotated[
        str,
        typer.Option(help="Comma-separated: BASE[:CRITERION]\\[@loop][+uncorrected][+distill]; default: the full set."),
    ] = "",
    seeds: Annotated[str, typer.Option(help="How many (3 is 0,1,2), or which ones: 1,5,9.")] = "3",
    budget: Annotated[
        str, typer.Option(help="Comma-separated: tokens, flops, pipeline; equal tokens are always run.")
    ] = "tokens",
    source_tokens: Annotated[
        str | None, typer.Option(help="That the source was pretrained on, such as 2T; for budget pipeline.")
    ] = None,
    lr_grid: Annotated[
        str, typer.Option(help="Multiples of train.lr that every arm tries; grows by 2 at an edge.")
    ] = "0.5,1,2",
    tasks: Annotated[str, typer.Option(help="Comma-separated zero-shot tasks for every result, as in `eval`.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Records of each task; default: all.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local records of the tasks, as in `eval`.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs and the page; default: RUN.DIR-compare.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Say how many runs, tokens and FLOPs lie ahead, and run none.")] = False,
) -> None:
    """The loop against its rivals at equal budgets: same batches, tuned rates, several seeds, paired intervals."""
    from efficientllm.comparison.arms import DEFAULT_ARMS, parse_arms
    from efficientllm.comparison.forecast import forecast
    from efficientllm.comparison.report import compare_and_report
    from efficientllm.comparison.work import Comparison
    from efficientllm.config import load_recipe
    from efficientllm.evaluation.harness import EvalRequest

    loaded = load_recipe(recipe, overrides or [])
    comparison = Comparison.of(
        loaded,
        parse_arms(_list(arms) or list(DEFAULT_ARMS)),
        _seeds(seeds),
        _list(budget),
        [_number(text) for text in _list(lr_grid)],
        out or Path(f"{loaded.run.dir}-compare"),
        EvalRequest(_list(tasks), limit, data_dir=data_dir) if tasks else None,
        _count(source_tokens) if source_tokens else None,
    )
    print(forecast(comparison) if dry_run else compare_and_report(comparison, say))


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise UsageError(f"--source-tokens: {error}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--lr-grid: {text!r} is no number; write multiples of train.lr such as 0.5,1,2") from None


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in _list(text)]
    except ValueError:
        raise UsageError(f"--seeds: {text!r} is neither a count (3) nor a list of seeds (1,5,9)") from None
    if any(number < 0 for number in numbers):
        raise UsageError("--seeds: a seed is not negative; give a count (3) or a list (1,5,9)")
    return list(range(numbers[0])) if len(numbers) == 1 and "," not in text else numbers
