"""The ladder: models that a run leaves on its way down, each to use as it is or to train on at its size.

ladder/469M/model/        the model, aligned, with tokenizer
            state/        weights, optimizer moments and place in the run
            recipe.yaml   how to go on at this size: `efficientllm continue ladder/469M`
            summary.json  size, widths, validation loss, tokens
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from efficientllm.checkpoint.export import export_model
from efficientllm.checkpoint.files import appearing
from efficientllm.checkpoint.store import checkpoints, save
from efficientllm.config import Recipe, dump_recipe, load_recipe
from efficientllm.errors import UsageError
from efficientllm.jobs.finish import generation_settings
from efficientllm.jobs.job import Job
from efficientllm.jobs.validate import validate
from efficientllm.reporting.progress import RunProgress
from efficientllm.sizes import format_count
from efficientllm.training.state import TrainState, capture

RECIPE = "recipe.yaml"


def leave_rung(job: Job, state: TrainState, rung: int, progress: RunProgress) -> None:
    """Leaves the model at this moment, which has just been cut to a size of the ladder."""
    assert job.plan is not None
    folder = job.folder.path / "ladder" / format_count(job.plan.landings[rung].target)
    facts: dict[str, Any] = {
        "parameters": state.allocated_parameters,
        "widths": asdict(state.space.widths),
        "validation_loss": validate(job, state, progress),
        "step": state.step,
        "tokens": state.tokens,
    }
    with appearing(folder) as partial:
        export_model(state.model, job.tokenizer, partial / "model", generation=generation_settings(job))
        snapshot = capture(state)
        snapshot.pruner_tensors, snapshot.pruner_facts = {}, None
        path = save(partial / "state", snapshot)
        recipe = job.recipe.model_copy(
            update={
                "source": str(folder / "model"),
                "tokenizer": None,
                "init": "pretrained",
                "resume": str(folder / "state" / path.name),
                "prune": None,
                "run": job.recipe.run.model_copy(update={"dir": str(folder / "run")}),
            }
        )
        (partial / RECIPE).write_text(dump_recipe(recipe))
        (partial / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
    progress.note(
        f"{folder}: {format_count(facts['parameters'])} parameters, validation loss {facts['validation_loss']:.4f}; "
        f"`efficientllm continue {folder}` trains it on"
    )


def recipe_of(snapshot: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe that goes on from a snapshot. Raises UsageError for a folder that is none."""
    file = snapshot / RECIPE
    if not file.is_file() or not checkpoints(snapshot / "state"):
        raise UsageError(f"{snapshot} is not a snapshot of a ladder; name a folder such as runs/mine/ladder/469M")
    return load_recipe(file, overrides)
