"""The command that measures finished models: eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efficientllm.cli.app import app, one_sentence, say
from efficientllm.errors import UsageError

if TYPE_CHECKING:
    from efficientllm.evaluation.harness import EvalRequest

Evaluated = tuple[str, Path | None, Any]  # source, folder that keeps the results, tokenizer


@app.command(name="eval")
@one_sentence()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Run folders, transformers folders, .gguf files or hub ids.")
    ],
    tasks: Annotated[str, typer.Option(help="Comma-separated harness tasks; default: the paper's eight.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="The first records of each task; default: all.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Records of each task drawn at random, the same for every model.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto (8 on a CPU).")] = "auto",
    data_dir: Annotated[
        Path | None, typer.Option(help="Local records: DIR/<hub id>/<config>/<split>.jsonl; default: the hub.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="File for all results and versions.")] = None,
) -> None:
    """Zero-shot accuracy by lm-evaluation-harness, beside the paper's Table 2; `n`: normalised by length, `a`: not."""
    if limit is not None and sample is not None:
        raise UsageError("--limit takes the first records and --sample draws some of all: give one of them")
    failed: dict[str, str] = {}
    named = [model for model in dict.fromkeys(models) if _guarded(model, failed, _exists, model)]
    if not named:  # before the harness, which takes long to load
        _say_what_is_missing({}, failed)
    from efficientllm.evaluation.harness import EvalRequest, check_tasks
    from efficientllm.evaluation.tasks import TASKS
    from efficientllm.files import write_json
    from efficientllm.jobs.device import choose_device

    names = [name.strip() for name in tasks.split(",") if name.strip()] or list(TASKS)
    request = EvalRequest(names, limit, _batch_size(batch_size), data_dir, sample)
    manager, place = check_tasks(request), choose_device(device)
    subjects = {model: each for model in named if (each := _guarded(model, failed, _subject, model))}
    found: dict[str, dict[str, Any]] = {}
    for model, subject in subjects.items():
        say(f"{model}: {len(names)} tasks")
        _guarded(model, failed, _measure, model, subject, request, manager, place, found)
        if out is not None:  # after every model: what comes next may end in any way
            write_json(out, found)
    if found:
        _show(found, names)
    _say_what_is_missing(found, failed)


def _guarded(model: str, failed: dict[str, str], act: Callable[..., Any], *arguments: Any) -> Any:
    """What `act` returns; None where the user has to mend the model, which is said while the others go on."""
    try:
        return act(*arguments)
    except UsageError as error:
        failed[model] = str(error)
        say(f"{model} is left out: {error}")
        return None


def _exists(model: str) -> str:
    """Raises UsageError for a path that leads nowhere."""
    from efficientllm.models.loading import located

    return located(model, "model")


def _measure(
    model: str, subject: Evaluated, request: EvalRequest, manager: Any, place: Any, found: dict[str, dict[str, Any]]
) -> None:
    """Adds the model's results to `found`, and keeps them in its run folder."""
    from efficientllm.evaluation.harness import evaluate as evaluate_model
    from efficientllm.evaluation.harness import joined_with, results_file
    from efficientllm.files import write_json
    from efficientllm.models.loading import load_model
    from efficientllm.reporting.evaluation_table import known_results

    source, home, tokenizer = subject
    loaded = load_model(source, device=place, what="model", use="evaluated").eval()
    found[model] = evaluate_model(loaded, tokenizer, request, manager, say)
    if home is None or not found[model]["results"]:
        return
    file = results_file(home, request)
    kept = joined_with(known_results(file), found[model])
    write_json(file, kept)
    if file.name != "results.json":
        say(f"{file}: kept apart, since results.json beside it holds figures over all records")


def _show(found: dict[str, dict[str, Any]], tasks: Sequence[str]) -> None:
    from efficientllm.evaluation.records import difference_rows
    from efficientllm.evaluation.tasks import eval_rows
    from efficientllm.reporting.evaluation_table import evaluation_way
    from efficientllm.reporting.tables import markdown

    print(markdown(list(eval_rows(found, tasks))))
    differences = difference_rows(found, tasks)
    if differences:
        print(f"\n{markdown(differences)}")
    any_result = next((each for each in found.values() if each["results"]), None)
    if any_result:
        versions = ", ".join(f"{task} v{number}" for task, number in any_result["versions"].items())
        print(f"\n{evaluation_way(any_result)}; {versions}")


def _say_what_is_missing(found: dict[str, dict[str, Any]], failed: dict[str, str]) -> None:
    """Raises UsageError where a model or a task was left out."""
    if not found:
        raise UsageError(f"nothing could be measured: see above for {', '.join(failed)}")
    tasks = sorted({task for each in found.values() for task in each["problems"]})
    left_out = [*failed, *tasks]
    if left_out:
        raise UsageError(f"left out: {', '.join(left_out)} (reasons above); all the rest is done")


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size {text} is neither auto nor a positive number")
    return int(text)


def _subject(model: str) -> Evaluated:
    """Where the model lies, the run folder (or ladder's) that is to keep the results, and the tokenizer."""
    from efficientllm.models.loading import load_tokenizer

    if not Path(model).is_dir():
        return model, None, load_tokenizer(model, what="model")
    from efficientllm.export.subject import subject_of

    subject = subject_of(Path(model))
    home = subject.folder.parent if subject.facts is not None else None
    return str(subject.folder), home, load_tokenizer(str(subject.folder), what="model")
