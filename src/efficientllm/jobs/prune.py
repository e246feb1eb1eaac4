"""The main job: a source model goes in, a compact model comes out. The same command resumes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from efficientllm import __version__
from efficientllm.checkpoint.export import export_model
from efficientllm.checkpoint.store import checkpoints, load, retain, save
from efficientllm.config import Recipe, dump_recipe
from efficientllm.errors import UsageError
from efficientllm.evaluation.validation import chosen_rows, validation_loss
from efficientllm.jobs.interruption import Interrupted, StopRequest, stop_signals
from efficientllm.jobs.records import compaction_record, event_records, metrics_record
from efficientllm.jobs.run_folder import RunFolder
from efficientllm.models.loading import load_config, load_generation_config, load_model, load_tokenizer
from efficientllm.models.space import space_of, widths_of
from efficientllm.reporting.journal import read_journal
from efficientllm.reporting.model_card import write_model_card
from efficientllm.reporting.plots import plot_run
from efficientllm.reporting.progress import RunProgress
from efficientllm.sizes import format_count
from efficientllm.training.corpus import Corpus, load_corpora
from efficientllm.training.gradient import Precision
from efficientllm.training.loop import StepRecord, train_steps
from efficientllm.training.planning import pruning_plan
from efficientllm.training.sampling import BatchStream
from efficientllm.training.state import PruningPlan, TrainState, capture, compact, restore, start


@dataclass
class Unlogged:
    """Tokens and seconds since the last line of metrics."""

    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before the first step."""

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    precision: Precision
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan | None
    batches: BatchStream
    batch_rows: int
    validation: Sequence[Corpus]
    steps: int
    corpora: list[str]  # name and content key of each; a run goes on only with the text that it began with
    unlogged: Unlogged


def run(recipe: Recipe, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs, or goes on with, the job of a recipe and returns its summary; a finished one is only read.

    `say` is told in one line what happens beside the steps. Raises UsageError for what the user can mend,
    Interrupted after SIGINT or SIGTERM, with the run saved.
    """
    folder = RunFolder(recipe.run.dir)
    with folder.lock():
        folder.adopt(recipe)
        done = folder.read_json(folder.summary)
        if done is not None:
            say(f"{folder.path} is finished: {result_line(done)}")
            return done
        job = prepare(recipe, folder, say)
        state, source = begin(job, say)
        with stop_signals() as stop:
            train(job, state, source, stop)
            summary = finish(job, state, source, say)
        if stop.signum is not None:
            raise Interrupted(f"stopped after {folder.path} had finished", stop.signum)
        return summary


def choose_device(wanted: str) -> torch.device:
    """`auto` takes the GPU where there is one. Raises UsageError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"train.device '{wanted}' is not available here; set it to auto or cpu") from error
    return device


def prepare(recipe: Recipe, folder: RunFolder, say: Callable[[str], None]) -> Job:
    """Checks everything that can be checked, tokenises, and lays out the batches."""
    device = choose_device(recipe.train.device)
    config = load_config(recipe.source, trust_remote_code=recipe.trust_remote_code)
    plan = pruning_plan(recipe, space_of(config))
    if plan is not None and plan.landing.gap > 0.01:
        say(
            f"alignment leaves no shape within 1 % of the target; the run will end {plan.landing.gap:.1%} under it "
            "(a smaller prune.align comes closer)"
        )
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.source, trust_remote_code=recipe.trust_remote_code)
    length = recipe.data.sequence_length
    if length > config.max_position_embeddings:
        raise UsageError(
            f"data.sequence_length {length} is more than the {config.max_position_embeddings} positions that the "
            f"source was built for; set it to {config.max_position_embeddings} or less"
        )
    training, validation = load_corpora(recipe.data, tokenizer, vocab_size=config.vocab_size, on_progress=say)
    rows = recipe.train.batch_rows(length)
    try:
        batches = BatchStream(training, [corpus.weight for corpus in training], rows, recipe.train.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    steps = recipe.train.steps(length)
    for corpus, epochs in zip(training, batches.epochs(steps), strict=True):
        if epochs > 1:
            say(f"{corpus.name}: {format_count(len(corpus) * length)} tokens will be read {epochs:.1f} times")
    precision = Precision.choose(recipe.train.precision, device)
    corpora = [f"{corpus.name} {corpus.key}" for corpus in (*training, *validation)]
    return Job(
        recipe,
        folder,
        device,
        precision,
        config,
        tokenizer,
        plan,
        batches,
        rows,
        validation,
        steps,
        corpora,
        Unlogged(),
    )


def begin(job: Job, say: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from: the newest checkpoint, or the source model; and the facts of the source."""
    saved = checkpoints(job.folder.checkpoints)
    source = job.folder.read_json(job.folder.source)
    if saved and source is not None:
        changed = [each for each in source["corpora"] if each not in job.corpora]
        if changed:
            name = changed[0].rsplit(maxsplit=1)[0]
            raise UsageError(
                f"{name} is not the text that run folder {job.folder.path} began with; restore it, or choose another "
                "run.dir"
            )
        snapshot = load(saved[-1])
        for journal in job.folder.journals:
            journal.rewind(snapshot.step)
        say(f"going on from {saved[-1]}, {format_count(snapshot.tokens)} tokens done")
        return restore(snapshot, job.recipe.train, job.plan, job.device), source
    if saved:
        raise UsageError(
            f"{job.folder.source} is missing, though there are checkpoints beside it; restore it, or choose another "
            "run.dir"
        )
    for journal in job.folder.journals:
        journal.rewind(0)
    seed = job.recipe.train.seed if job.recipe.init == "random" else None
    model = load_model(
        job.recipe.source,
        random_seed=seed,
        device=job.device,
        trust_remote_code=job.recipe.trust_remote_code,
    )
    state = start(model, job.recipe.train, job.plan)
    with RunProgress(0, description="source") as progress:
        loss = validate(job, state, progress)
    facts: dict[str, Any] = {
        "path": job.recipe.source,
        "init": job.recipe.init,
        "parameters": state.allocated_parameters,
        "widths": asdict(widths_of(job.config)),
        "validation_loss": loss,
        "corpora": job.corpora,
    }
    job.folder.write_json(job.folder.source, facts)
    say(f"source: {format_count(facts['parameters'])} parameters, {state.space.widths}, validation loss {loss:.4f}")
    return state, facts


def validate(job: Job, state: TrainState, progress: RunProgress) -> float:
    """Validation loss in nats per token, with a bar."""
    recipe = job.recipe
    tokens = recipe.run.validation_tokens
    limit = None if tokens is None else max(1, tokens // recipe.data.sequence_length)
    rows = sum(len(indices) for indices in chosen_rows(job.validation, limit))
    with progress.track("validation", rows) as tracker:
        return validation_loss(
            state.forward,
            job.validation,
            micro_batch=recipe.train.micro_batch,
            limit=limit,
            device=job.device,
            precision=job.precision,
            tick=tracker.advance,
        )


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]."""
    return after // every > before // every


def train(job: Job, state: TrainState, source: dict[str, Any], stop: StopRequest) -> None:
    """All steps that are left, each followed by its records, its validation and its checkpoint where due."""
    recipe = job.recipe
    total = job.steps * job.batch_rows * recipe.data.sequence_length
    checkpoint_every = recipe.run.checkpoint_every.tokens(total)
    validate_every = recipe.run.validate_every.tokens(total)
    rows = calibration_rows(recipe, job.batch_rows)
    records = train_steps(
        state,
        job.batches,
        recipe.train,
        job.plan,
        steps=job.steps,
        calibration_rows=rows,
        precision=job.precision,
    )
    with RunProgress(total, start=state.tokens, description=job.folder.path.name) as progress:
        before = state.tokens
        for record in records:
            if record.compaction:
                progress.note(compaction_line(record))
            due = crossed(validate_every, before, state.tokens) or state.step == job.steps
            loss = validate(job, state, progress) if due else None
            write_records(job, state, record, before, loss)
            tokens_per_second = (state.tokens - before) / record.seconds
            progress.update(
                state.tokens, loss=record.loss, live=state.live_parameters, tokens_per_second=tokens_per_second
            )
            last = state.step == job.steps
            if last or stop.signum is not None or crossed(checkpoint_every, before, state.tokens):
                checkpoint(job, state)
            if stop.signum is not None and not last:
                raise Interrupted(
                    f"stopped and saved after {format_count(state.tokens)} of {format_count(total)} tokens; the same "
                    "command goes on from there",
                    stop.signum,
                )
            before = state.tokens


def calibration_rows(recipe: Recipe, batch_rows: int) -> int:
    """Rows of the batch that measure a bundle's true cost: an eighth of it, at least 512 tokens, or as asked."""
    length = recipe.data.sequence_length
    tokens = recipe.prune.calibration_tokens if recipe.prune else None
    rows = max(batch_rows // 8, -(-512 // length)) if tokens is None else tokens // length
    return min(batch_rows, max(1, rows))


def write_records(job: Job, state: TrainState, record: StepRecord, before: int, loss: float | None) -> None:
    job.unlogged.seconds += record.seconds
    job.unlogged.tokens += state.tokens - before
    pruned = record.prune is not None and record.prune.events
    if state.step % job.recipe.run.log_every == 0 or loss is not None or pruned or record.compaction:
        job.folder.metrics.append(metrics_record(state, record, job.unlogged.tokens, job.unlogged.seconds, loss))
        job.unlogged.tokens, job.unlogged.seconds = 0, 0.0
    for event in event_records(state, record):
        job.folder.events.append(event)
    if record.compaction:
        job.folder.compactions.append(compaction_record(state, record.compaction))


def compaction_line(record: StepRecord) -> str:
    compaction = record.compaction
    assert compaction is not None
    return f"compacted to {compaction.after} ({format_count(compaction.allocated_after)} parameters)"


def checkpoint(job: Job, state: TrainState) -> None:
    """Saves, with the records that lead up to it on the disk before it."""
    for journal in job.folder.journals:
        journal.sync()
    save(job.folder.checkpoints, capture(state))
    retain(job.folder.checkpoints, job.recipe.run.keep)


def finish(job: Job, state: TrainState, source: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Exports the model, draws the picture, writes the summary last: its presence means finished."""
    if job.plan and state.pruner and not state.pruner.finished:
        say(
            f"the run ended at {format_count(state.live_parameters)} parameters, above the target of "
            f"{format_count(job.plan.landing.target)}: events are left undone; train longer or lower prune.every"
        )
    if job.plan and state.live_widths != state.space.widths:
        compact(
            state, job.plan.landing.align.round_up(state.live_widths, state.space.widths), job.recipe.train, job.plan
        )
    summary = summarize(job, state, source)
    export_model(
        state.model,
        job.tokenizer,
        job.folder.model,
        generation=load_generation_config(job.recipe.source),
        extras=lambda path: write_model_card(path, summary),
    )
    plot_run(job.folder.path, job.folder.path / "run.png")
    job.folder.write_json(job.folder.summary, summary)
    say(f"{job.folder.model}: {result_line(summary)}")
    return summary


def summarize(job: Job, state: TrainState, source: dict[str, Any]) -> dict[str, Any]:
    metrics = read_journal(job.folder.metrics.path)
    losses = [record["validation_loss"] for record in metrics if "validation_loss" in record]
    return {
        "source": source,
        "result": {
            "path": str(job.folder.model),
            "parameters": state.allocated_parameters,
            "widths": asdict(state.space.widths),
            "validation_loss": losses[-1],
        },
        "tokens": state.tokens,
        "refresh_tokens": state.refresh_tokens,
        "events": len(read_journal(job.folder.events.path)),
        "compactions": len(read_journal(job.folder.compactions.path)),
        "seconds": sum(record["seconds"] for record in metrics),
        "efficientllm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": dump_recipe(job.recipe),
    }


def result_line(summary: dict[str, Any]) -> str:
    source, result = summary["source"], summary["result"]
    return (
        f"{format_count(result['parameters'])} parameters, validation loss {result['validation_loss']:.4f} "
        f"(source: {format_count(source['parameters'])}, {source['validation_loss']:.4f})"
    )
