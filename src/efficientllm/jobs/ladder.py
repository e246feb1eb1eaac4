"""The ladder: models that a run leaves on its way down, each to use as it is or to train on at its size.

ladder/469M/model/        the model, aligned, with tokenizer
            state/        weights, optimizer moments and place in the run
            recipe.yaml   how to go on at this size: `efficientllm continue ladder/469M`, into continued/469M
            summary.json  size, widths, validation loss, tokens
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from efficientllm.checkpoint.export import export_model
from efficientllm.checkpoint.store import checkpoints, disk_errors, save
from efficientllm.config import Recipe, dump_recipe, load_recipe
from efficientllm.errors import UsageError
from efficientllm.files import atomic_path
from efficientllm.jobs.finish import generation_settings
from efficientllm.jobs.job import Job
from efficientllm.jobs.validate import validate
from efficientllm.pruning.contract import ORIGIN
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.reporting.journal import without_nonfinite
from efficientllm.reporting.progress import RunProgress
from efficientllm.sizes import format_amount, format_count
from efficientllm.training.state import TrainState, capture, whole_model

RECIPE = "recipe.yaml"


def leave_milestone(job: Job, state: TrainState, milestone: int, progress: RunProgress) -> None:
    """Leaves the model at this moment, which has just been cut to a size of the ladder."""
    assert job.pruning is not None
    folder = job.folder.ladder / _name(job.pruning.milestones[milestone])
    left = job.ranks.from_first(lambda: job.folder.read_json(folder / "summary.json"))
    if left is not None and left["step"] == state.step:
        return  # a run that was killed and resumed comes by again, with the same weights
    loss = validate(job, state, progress)
    facts: dict[str, Any] = {
        "parameters": state.allocated_parameters,
        "widths": state.space.widths.record(),
        "validation_loss": loss,
        **job.in_its_tokens(loss),
        "step": state.step,
        "tokens": state.tokens,
        "flops": without_nonfinite(state.flops.total),
    }
    model = whole_model(state)
    with ExitStack() as stack:
        begin = disk_errors(str(folder))(lambda: stack.enter_context(atomic_path(folder)))
        partial = job.ranks.from_first(begin)
        snapshot = capture(state)
        origin = {name: units for name, units in snapshot.pruner_tensors.items() if name.startswith(ORIGIN)}
        snapshot.pruner_tensors, snapshot.pruner_facts = origin, None
        path = save(partial / "state", snapshot, job.ranks)

        def complete() -> None:
            assert model is not None
            export_model(model, job.tokenizer, partial / "model", generation=generation_settings(job))
            with disk_errors(str(folder)):
                (partial / RECIPE).write_text(dump_recipe(_continuation(job, folder, path.name)))
                (partial / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
                stack.close()

        job.ranks.from_first(complete)
    progress.note(
        f"{folder}: {format_count(facts['parameters'])} parameters, validation loss {facts['validation_loss']:.4f}; "
        f"`efficientllm continue {folder}` trains it on"
    )


def _name(feasible: FeasibleShapes) -> str:
    """Of a milestone's folder: 469M, or flops-1.2M, kv-cache-2048, latency-12.3ms."""
    if feasible.cost.name == "params":
        return format_count(int(feasible.target))
    size = format_amount(feasible.target, feasible.cost.unit).removesuffix(f" {feasible.cost.unit}")
    return f"{feasible.cost.name}-{size.replace(' ', '')}"


def _continuation(job: Job, folder: Path, snapshot: str) -> Recipe:
    """The recipe that goes on from a milestone's snapshot."""
    distill = job.recipe.distill
    if distill and distill.teacher is None:
        distill = distill.model_copy(update={"teacher": job.recipe.source})
    here = places(folder, snapshot)
    here["run"] = job.recipe.run.model_copy(update=here["run"])
    plain: dict[str, Any] = {"tokenizer": None, "init": "pretrained", "prune": None, "distill": distill}
    return job.recipe.model_copy(update=plain | here)


def places(folder: Path, state: str) -> dict[str, Any]:
    """Keys of the recipe that say where the snapshot lies, and where its continuation goes: beside the ladder, so that
    nothing is lost when the ladder is left anew."""
    run = folder.parent.parent / "continued" / folder.name
    return {"source": str(folder / "model"), "resume": str(folder / "state" / state), "run": {"dir": str(run)}}


def recipe_of(snapshot: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe that goes on from a snapshot. Raises UsageError for a folder that is none."""
    file = snapshot / RECIPE
    if not file.is_file() or not checkpoints(snapshot / "state"):
        raise UsageError(f"{snapshot} is not a snapshot of a ladder; name a folder such as runs/mine/ladder/469M")
    here = places(snapshot, checkpoints(snapshot / "state")[-1].name)
    where = [f"source={json.dumps(here['source'])}", f"resume={json.dumps(here['resume'])}"]
    return load_recipe(file, [*where, f"run.dir={json.dumps(here['run']['dir'])}", *overrides], dumped=True)
