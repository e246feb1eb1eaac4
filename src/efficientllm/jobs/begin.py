"""Where a run begins: at its newest checkpoint, at one of another run, at a ladder's snapshot, or at the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from efficientllm.checkpoint.store import MANIFEST, checkpoints, load
from efficientllm.config import Recipe
from efficientllm.distributed.ranks import error_of_all
from efficientllm.errors import UsageError
from efficientllm.files import write_json
from efficientllm.jobs.device import arithmetic, other_bits
from efficientllm.jobs.job import Job
from efficientllm.jobs.run_folder import RunFolder
from efficientllm.jobs.validate import validate
from efficientllm.jobs.vocabulary import without_others
from efficientllm.models.flops import forward_flops
from efficientllm.models.loading import load_model
from efficientllm.models.rotation import components, rotate
from efficientllm.models.space import widths_of
from efficientllm.pruning.engine import OtherRule
from efficientllm.pruning.looks import scores_are_known
from efficientllm.pruning.tokens import KEPT
from efficientllm.reporting.progress import RunProgress
from efficientllm.sizes import exact_count, format_count
from efficientllm.training.gradient import model_inputs
from efficientllm.training.state import TrainState, restore, start


def begin(job: Job, say: Callable[[str], None]) -> tuple[Job, TrainState, dict[str, Any]]:
    """The job as it goes on, the state to go on from, and the facts of the source. A collective."""
    recipe, ranks = job.recipe, job.ranks
    saved, source = ranks.from_first(lambda: _what_is_there(job))
    if saved is None and recipe.resume:
        saved = Path(recipe.resume)
        source = ranks.from_first(lambda: _branch(job, Path(recipe.resume or "")))
    elif saved is None:
        ranks.from_first(lambda: job.folder.rewind(0))
        model = ranks.together(lambda: _source_model(job))
        rows = job.plan.turned_by
        if rows:
            rotate(model, ranks.from_first(lambda: components(model, _inputs(job, rows, model))))
            say(f"the residual stream is turned into its principal components, by {rows} rows of text")
        state = start(model, recipe.train, job.pruning, ranks)
        if rows:
            state.origin = {}  # its channels are mixtures of the source's
        state.flops.looks += forward_flops(state.space, rows, job.plan.length).base
        return job, state, _measured(job, state, say)
    snapshot = load(saved, ranks, job.device)
    if snapshot.pruner_facts is not None and job.pruning is None:
        raise error_of_all(ranks, f"{saved} is of a run that prunes; give the recipe its prune section")
    if snapshot.pruner_facts is not None and not scores_are_known(snapshot.pruner_facts):
        say(f"{saved} is of an earlier version, whose scores are in another unit: they are taken anew")
    if source:
        say(f"going on from {saved}, {format_count(snapshot.tokens)} tokens done")
        for difference in other_bits(source, arithmetic(job.device)):
            say(difference)
    if KEPT in snapshot.pruner_tensors:
        job = without_others(job, snapshot.pruner_tensors[KEPT].cpu(), say)
    try:
        state = restore(snapshot, recipe.train, job.pruning, job.device, ranks)
    except OtherRule as error:
        raise error_of_all(ranks, f"{saved} is of a run that cannot go on: {error}") from error
    if source:
        ranks.from_first(lambda: job.folder.rewind(snapshot.step))
    return job, state, source or _measured(job, state, say)


def _inputs(job: Job, rows: int, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Of the first rows that the run will read, a micro-batch at a time."""
    step, left = 0, rows
    while left > 0:
        batch = job.batches.batch(step, slice(0, left)).to(model.device)
        yield from map(model_inputs, batch.split(job.recipe.train.micro_batch))
        step, left = step + 1, left - len(batch)


def _measured(job: Job, state: TrainState, say: Callable[[str], None]) -> dict[str, Any]:
    """The facts of the source, which are written down once."""
    with RunProgress(0, description="source", stream=job.stream) as progress:
        loss = validate(job, state, progress)
    facts: dict[str, Any] = {
        "path": job.recipe.source,
        "init": job.recipe.init,
        "on_disk": on_disk(job.recipe),
        "parameters": state.allocated_parameters,
        "widths": state.space.widths.record(),
        "validation_loss": loss,
        "validation_rows": job.plan.pace.rows,
        **job.in_its_tokens(loss),
        "corpora": job.corpora,
        "precision": job.precision.name,
        **arithmetic(job.device),
    }
    if job.pruning and job.pruning.feasible.cost.name != "params":
        facts["cost"] = job.pruning.feasible.cost.key
    job.ranks.from_first(lambda: write_json(job.folder.source, facts))
    say(f"source: {format_count(facts['parameters'])} parameters, {state.space.widths}, validation loss {loss:.4f}")
    return facts


def on_disk(recipe: Recipe) -> list[str]:
    """Which of the recipe's source and texts lie on this machine: the others are the hub's, for a card to name."""
    named = [recipe.source, *(each.place for each in (*recipe.data.train, *recipe.data.validation_sources))]
    return [path for path in dict.fromkeys(named) if Path(path).exists()]


def _branch(job: Job, saved: Path) -> dict[str, Any]:
    """Makes the run folder that of a run which has come to another run's checkpoint: its source, its journals.

    A ladder's snapshot is a source of its own, which is still to be measured: {}.
    """
    if not (saved / MANIFEST).is_file():
        raise UsageError(
            f"resume {saved} is no checkpoint (it has no {MANIFEST}); name one such as RUN/checkpoints/step-N"
        )
    other = RunFolder(saved.parent.parent)
    source = other.read_json(other.source) if saved.parent == other.checkpoints else None
    if source is None:
        job.folder.rewind(0)
        return {}
    _check_source(job, source, other)
    if source["widths"] != widths_of(job.plan.source).record():
        raise UsageError(f"resume {saved} is of a run from another source; set source to {source['path']}")
    job.folder.take_over(other)
    return source


def _source_model(job: Job) -> PreTrainedModel:
    recipe = job.recipe
    return load_model(
        recipe.source,
        random_seed=recipe.train.seed if recipe.init == "random" else None,
        device=job.device if job.ranks.world == 1 else "cpu",  # sharding takes it to the device piece by piece
    )


def _what_is_there(job: Job) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint, if any, and the facts of the source beside it."""
    saved = checkpoints(job.folder.checkpoints)
    source = job.folder.read_json(job.folder.source)
    if not saved:
        if source and job.folder.ladder.is_dir():  # whose sizes are left as they are where a run comes by again
            _check_source(job, source, job.folder)
        return None, {}
    if source is None:
        raise UsageError(
            f"{job.folder.source} is missing, though there are checkpoints beside it; restore it, or choose another "
            "run.dir"
        )
    _check_source(job, source, job.folder)
    return saved[-1], source


def _check_source(job: Job, source: dict[str, Any], folder: RunFolder) -> None:
    """Raises UsageError where a run on the disk is not one that this recipe could go on with."""
    changed = [each for each in source["corpora"] if each not in job.corpora]
    if changed:
        name = changed[0].rsplit(maxsplit=1)[0]
        raise UsageError(
            f"{name} is not the text that run folder {folder.path} began with; restore it, or choose another run.dir"
        )
    cost = job.pruning.feasible.cost if job.pruning else None
    begun = source.get("cost", "params")
    if cost and begun != cost.key:
        tables = begun.startswith(cost.name) and cost.name == "latency"
        what = "another prune.latency_table under that name" if tables else f"prune.cost {begun}"
        raise UsageError(f"run folder {folder.path} was begun with {what}; restore it, or choose another run.dir")
    rows = source.get("validation_rows", job.plan.pace.rows)
    if rows != job.plan.pace.rows:
        tokens = exact_count(rows * job.recipe.data.sequence_length)
        raise UsageError(
            f"the source of run folder {folder.path} was validated on {rows:,} rows, and this run would take "
            f"{job.plan.pace.rows:,}; set run.validation_tokens to {tokens}"
        )
    if source.get("precision") != job.precision.name:
        raise UsageError(
            f"run folder {folder.path} was begun in {source.get('precision')}, and this machine would go on in "
            f"{job.precision.name}; go on where it was begun, or choose another run.dir"
        )
