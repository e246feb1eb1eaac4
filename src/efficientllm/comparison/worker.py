"""One run of a comparison in a process of its own, so that its peak memory is its own too.

    python -m efficientllm.comparison.worker RECIPE.yaml

Trains (or goes on, or finds it finished), then measures the model on every validation window. Exits with 0; with 2
and one sentence in RECIPE.error where the recipe cannot be run; with 128 + signal where it was stopped and saved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from efficientllm.config import Recipe, load_recipe
from efficientllm.errors import UsageError
from efficientllm.evaluation.validation import chosen_rows
from efficientllm.files import write_atomically, write_json
from efficientllm.jobs.interruption import Interrupted
from efficientllm.jobs.job import Job, prepare
from efficientllm.jobs.prune import run
from efficientllm.jobs.run_folder import RunFolder
from efficientllm.models.loading import load_model
from efficientllm.reporting.progress import track
from efficientllm.training.chunked_loss import IGNORED
from efficientllm.training.gradient import next_tokens, row_losses

WINDOWS = "windows.json"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measure_windows(recipe: Recipe) -> None:
    """Writes windows.json into the run folder: mean loss of each validation row in nats per token, and its bytes."""
    folder = RunFolder(recipe.run.dir)
    out = folder.path / WINDOWS
    if out.is_file():
        return
    job = prepare(recipe, folder, lambda message: None)
    content = window_losses(job, load_model(str(folder.model), device=job.device).eval())
    write_json(out, content)


def window_losses(job: Job, model: Any) -> dict[str, Any]:
    """losses: nats per predicted token of each window. tokens: how many are predicted in each. bytes: UTF-8 length of
    all text that is predicted in them, special tokens apart."""
    chosen = chosen_rows(job.validation, job.plan.pace.rows)
    losses: list[float] = []
    tokens: list[int] = []
    size = 0
    with torch.no_grad(), track("validation windows", sum(map(len, chosen))) as bar:
        for corpus, indices in zip(job.validation, chosen, strict=True):
            for first in range(0, len(indices), job.recipe.train.micro_batch):
                rows = corpus.take(indices[first : first + job.recipe.train.micro_batch])
                rows_there = rows.to(job.device)
                losses += row_losses(model, rows_there, job.precision, chunked=job.chunked_loss).tolist()
                predicted = [labels[labels != IGNORED] for labels in next_tokens(rows)]
                tokens += map(len, predicted)
                texts = job.tokenizer.batch_decode(predicted, skip_special_tokens=True)
                size += sum(len(text.encode()) for text in texts)
                bar.advance(len(rows))
    return {"losses": losses, "bytes": size, "tokens": tokens}


def main(path: Path) -> int:
    error = path.with_suffix(".error")
    error.unlink(missing_ok=True)
    try:
        recipe = load_recipe(path)
        run(recipe, say)
        measure_windows(recipe)
    except UsageError as problem:
        write_atomically(error, f"{problem}\n".encode())
        say(f"error: {problem}")
        return 2
    except Interrupted as stop:
        say(str(stop))
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
