"""Validation of a run's model on the rows that its recipe holds out."""

from __future__ import annotations

from collections.abc import Callable

from efficientllm.evaluation.validation import chosen_rows, validation_loss
from efficientllm.jobs.job import Job
from efficientllm.reporting.progress import RunProgress
from efficientllm.training.state import TrainState


def validate(job: Job, state: TrainState, progress: RunProgress, check: Callable[[], None] = lambda: None) -> float:
    """Validation loss in nats per token, with a bar; `check` is called between micro-batches and may raise."""
    recipe = job.recipe
    rows = sum(len(indices) for indices in chosen_rows(job.validation, job.plan.pace.rows))
    with progress.track("validation", rows) as tracker:

        def tick(rows: int) -> None:
            tracker.advance(rows)
            check()

        return validation_loss(
            state.model,
            job.validation,
            micro_batch=recipe.train.micro_batch,
            limit=job.plan.pace.rows,
            device=job.device,
            precision=job.precision,
            chunked=job.chunked_loss,
            runner=state.runner,
            ranks=state.ranks,
            tick=tick,
        )
