"""The command that measures finished models: eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from efficientllm.cli.app import app, one_sentence, say
from efficientllm.errors import UsageError


@app.command(name="eval")
@one_sentence()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Run folders, transformers folders or hub ids.")
    ],
    tasks: Annotated[str, typer.Option(help="Comma-separated harness tasks; default: the paper's eight.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Records of each task; default: all.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto.")] = "auto",
    data_dir: Annotated[
        Path | None, typer.Option(help="Local records: DIR/<hub id>/<config>/<split>.jsonl; default: the hub.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="File for all results and versions.")] = None,
) -> None:
    """Zero-shot accuracy by lm-evaluation-harness, beside the paper's Table 2; `n`: normalised by length, `a`: not."""
    subjects = {model: _folders(model) for model in dict.fromkeys(models)}  # first: the harness takes long to load
    from efficientllm.evaluation.harness import EvalRequest, check_tasks, joined_with, known_results
    from efficientllm.evaluation.harness import evaluate as evaluate_model
    from efficientllm.evaluation.tasks import PAPER, TASKS
    from efficientllm.jobs.job import choose_device
    from efficientllm.models.loading import load_model, load_tokenizer
    from efficientllm.reporting.eval_table import eval_rows, markdown
    from efficientllm.reporting.journal import write_atomically

    names = [name.strip() for name in tasks.split(",") if name.strip()] or list(TASKS)
    request = EvalRequest(names, limit, _batch_size(batch_size), data_dir)
    manager = check_tasks(request)
    tokenizers = {model: load_tokenizer(source, what="model") for model, (source, _) in subjects.items()}
    found: dict[str, dict[str, Any]] = {}
    for model, (source, home) in subjects.items():
        say(f"{model}: {len(names)} tasks")
        loaded = load_model(source, device=choose_device(device), what="model", use="evaluated").eval()
        found[model] = evaluate_model(loaded, tokenizers[model], request, manager, say)
        if home is not None and found[model]["results"]:
            (home / "eval").mkdir(exist_ok=True)
            file = home / "eval" / "results.json"
            kept = joined_with(known_results(file), found[model])
            write_atomically(file, (json.dumps(kept, indent=1) + "\n").encode())
    columns = {task: f"{TASKS.get(task, task)}" for task in names}
    rows = list(eval_rows(found, columns, PAPER))
    print(markdown(rows))
    any_result = next((each for each in found.values() if each["results"]), None)
    if any_result:
        versions = ", ".join(f"{task} v{number}" for task, number in any_result["versions"].items())
        print(f"\nlm-evaluation-harness {any_result['harness']}; {versions}; zero-shot; limit {limit or 'none'}")
    if out is not None:
        write_atomically(out, (json.dumps(found, indent=1) + "\n").encode())
    left_out = sorted({task for each in found.values() for task in each["problems"]})
    if left_out:
        raise UsageError(f"left out: {', '.join(left_out)} (reasons above); the other tasks are done")


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size {text} is neither auto nor a positive number")
    return int(text)


def _folders(model: str) -> tuple[str, Path | None]:
    """Where the model lies, and the run folder (or ladder's) that is to keep the results. Raises UsageError for a path
    that leads nowhere."""
    if not Path(model).is_dir():
        from efficientllm.models.loading import located

        return located(model, "model"), None
    from efficientllm.export.subject import subject_of

    subject = subject_of(Path(model))
    home = subject.folder.parent if subject.facts is not None else None
    return str(subject.folder), home
