"""The main job: a source model goes in, a compact model comes out. The same command resumes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import Any

from efficientllm.checkpoint.store import checkpoints, retain, save
from efficientllm.config import Recipe
from efficientllm.distributed.ranks import ALONE, World, error_of_all
from efficientllm.distributed.watch import watched
from efficientllm.jobs.begin import begin
from efficientllm.jobs.device import deterministic
from efficientllm.jobs.finish import finish, result_line
from efficientllm.jobs.interruption import Interrupted, StopRequest, stop_signals
from efficientllm.jobs.job import Job, prepare, teacher_of
from efficientllm.jobs.ladder import leave_milestone
from efficientllm.jobs.records import compaction_record, event_records, metrics_record
from efficientllm.jobs.run_folder import RunFolder
from efficientllm.jobs.validate import validate
from efficientllm.jobs.vocabulary import shed_tokens, vocabulary_of
from efficientllm.models.process_memory import memory_in_a_sentence
from efficientllm.pruning.contract import PruneReport
from efficientllm.reporting.progress import RunProgress
from efficientllm.sizes import format_count
from efficientllm.training.distillation import Distillation
from efficientllm.training.loop import Diverged, StepRecord, check_finite, train_steps
from efficientllm.training.state import TrainState, capture
from efficientllm.training.vocabulary import Vocabulary

AT_LATEST = 3600.0  # seconds between two checkpoints, however long a tenth of the run is
LINES = 10_000  # of metrics in a run, spread over its steps: more make no picture finer, and reports read them all
OUT_OF_MEMORY = (
    "out of memory",
    "lower train.micro_batch or set train.gradient_checkpointing=true, then run the same command again: what is saved "
    "is not lost",
)


def run(recipe: Recipe, say: Callable[[str], None], ranks: World = ALONE) -> dict[str, Any]:
    """Runs, or goes on with, the job of a recipe and returns its summary; a finished one is only read.

    `say` is told in one line what happens beside the steps. ranks: this process among those that share the run, all of
    which call this. Raises UsageError for what the user can mend, Interrupted after SIGINT or SIGTERM, with the run
    saved.
    """
    folder = RunFolder(recipe.run.dir, writes=ranks.leads)
    say = say if ranks.leads else lambda message: None
    with ExitStack() as held:
        held.enter_context(deterministic(recipe.train.deterministic))

        def claim() -> dict[str, Any] | None:
            held.enter_context(folder.lock())
            folder.adopt(recipe)
            return folder.read_json(folder.summary)

        done = ranks.from_first(claim)
        if done is not None:
            say(f"{folder.path} is finished: {result_line(done)}")
            return done
        job = prepare(recipe, folder, say, ranks)
        with memory_in_a_sentence(*OUT_OF_MEMORY), watched(job.ranks, recipe.distributed.timeout):
            job, state, source = begin(job, say)
            with stop_signals() as stop:
                try:
                    if ranks.leads:
                        job.trackers.start(recipe.run.trackers, folder.path, recipe.model_dump(mode="json"), state.step)
                    teacher = ranks.together(lambda: teacher_of(job, state))
                    job = train(job, state, stop, teacher)
                except Diverged as error:
                    raise error_of_all(ranks, f"{error}; {after_divergence(job)}") from error
                finally:
                    job.trackers.close()
                summary = finish(job, state, source, say)
            stopped = agreed(job, stop)
        if stopped is not None:
            raise Interrupted(f"stopped after {folder.path} had finished", stopped)
        return summary


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]."""
    return after // every > before // every


def train(job: Job, state: TrainState, stop: StopRequest, teacher: Distillation | None) -> Job:
    """All steps that are left, each followed by its records, its validation and its checkpoint where due. Returns the
    job as it is at the end: where tokens fall, another goes on."""
    recipe = job.recipe
    total = job.plan.tokens
    checkpoint_every = recipe.run.checkpoint_every.interval(total)
    vocabulary = vocabulary_of(job)
    records = _steps(job, state, teacher, vocabulary)
    name = job.folder.path.name
    with RunProgress(total, start=state.tokens, description=name, stream=job.stream) as progress:
        before, warned, saved_at = state.tokens, False, time.monotonic()
        while (record := next(records, None)) is not None:
            if vocabulary and record.prune and record.prune.vocabulary:
                records.close()
                job, record = shed_tokens(job, state, record, vocabulary, progress.note)
                vocabulary = vocabulary_of(job)
                records = _steps(job, state, teacher, vocabulary)
            if record.compaction:
                progress.note(compaction_line(record))
            milestone = record.prune.milestone if record.prune else None
            if milestone is not None:
                check_finite(state)
                leave_milestone(job, state, milestone, progress)
            if state.skipped_in_a_row:
                progress.note(f"step {state.step} was skipped: its loss or gradient is not finite")
            if record.prune and not warned and (said := trouble(record.prune)):
                warned = True
                progress.note(said)
            last = state.step == job.plan.steps
            due = last or crossed(job.plan.pace.every, before, state.tokens)
            loss = validate_unless_stopped(job, state, progress, stop) if due else None
            # All processes agree on it once a step: a signal that comes later is acted on after the next step.
            stopping, late = stop_or_save(job, stop, time.monotonic() - saved_at > AT_LATEST)
            saving = last or late or crossed(checkpoint_every, before, state.tokens)
            saving = saving or milestone is not None or stopping is not None
            write_records(job, state, record, before, loss, always=saving)
            tokens_per_second = (state.tokens - before) / record.seconds
            progress.update(
                state.tokens, loss=record.loss, live=state.live_parameters, tokens_per_second=tokens_per_second
            )
            if saving:
                checkpoint(job, state)
                saved_at = time.monotonic()
            if stopping is not None:
                raise Interrupted(
                    f"stopped and saved after {format_count(state.tokens)} of {format_count(total)} tokens; the same "
                    "command goes on from there",
                    stopping,
                )
            before = state.tokens
    return job


def _steps(
    job: Job, state: TrainState, teacher: Distillation | None, vocabulary: Vocabulary | None
) -> Generator[StepRecord, None, None]:
    """The loop over the job's text as it is encoded now."""
    return train_steps(
        state,
        job.batches,
        job.recipe.train,
        job.pruning,
        steps=job.plan.steps,
        precision=job.precision,
        batch_rows=job.plan.batch_rows,
        distillation=teacher,
        vocabulary=vocabulary,
    )


def agreed(job: Job, stop: StopRequest) -> int | None:
    """The signal that asked any of the processes to stop, the same on all of them."""
    return stop_or_save(job, stop, False)[0]


def stop_or_save(job: Job, stop: StopRequest, late: bool) -> tuple[int | None, bool]:
    """The signal that asked any of the processes to stop, and where there is none whether any has waited too long for
    a checkpoint; the same on all of them, who meet once for both."""
    signum, waited = divmod(job.ranks.largest(2 * (stop.signum or 0) + late), 2)
    return signum or None, bool(waited)


def after_divergence(job: Job) -> str:
    saved = checkpoints(job.folder.checkpoints)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    again = f", resume={saved[-1]}" if saved else ""
    return f"{last}; run it again with a lower train.lr in another run.dir{again}"


BLIND = (
    "pruning was due, but every score was no number, so that nothing fell; metrics.jsonl counts such looks under "
    "nonfinite (lower train.lr, or train without bf16, if it goes on)"
)


def trouble(report: PruneReport) -> str | None:
    """What a step of pruning had to leave out, once a run."""
    if report.blind:
        return BLIND
    return SKIPPED if report.corrections.skipped else STARVED if report.corrections.starved else None


STARVED = (
    "an expert that fewer of the captured tokens had chosen than it has channels was left uncorrected; metrics.jsonl "
    "counts them under corrections.starved (larger batches give each more tokens)"
)
SKIPPED = (
    "a correction did not converge and was left out; metrics.jsonl counts them under corrections.skipped (set "
    "prune.correction to none if they are many)"
)


def validate_unless_stopped(job: Job, state: TrainState, progress: RunProgress, stop: StopRequest) -> float | None:
    """None where a signal came before it was done: saving comes first, since the time left may be short."""
    if agreed(job, stop) is not None:
        return None

    def check() -> None:
        signum = agreed(job, stop)
        if signum is not None:
            raise Interrupted("", signum)

    try:
        return validate(job, state, progress, check)
    except Interrupted:
        return None


def write_records(
    job: Job, state: TrainState, record: StepRecord, before: int, loss: float | None, *, always: bool
) -> None:
    """A line of metrics where one is due, and always before a checkpoint: no token or second is lost on resume."""
    job.unlogged.seconds += record.seconds
    job.unlogged.tokens += state.tokens - before
    pruned = record.prune is not None and record.prune.events
    due = state.step % -(-job.plan.steps // LINES) == 0 or loss is not None
    if always or due or pruned or record.compaction:
        line = metrics_record(state, record, job.unlogged.tokens, job.unlogged.seconds, loss)
        line |= {} if loss is None else job.bits_per_byte(loss)
        job.folder.metrics.append(line)
        job.trackers.log(line)
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
    """Saves, with the records that lead up to it on the disk before it. Raises Diverged instead of saving weights that
    are not finite."""
    check_finite(state)
    job.ranks.from_first(job.folder.sync)
    save(job.folder.checkpoints, capture(state), job.ranks)
    if job.ranks.leads:
        retain(job.folder.checkpoints, job.recipe.run.keep)
