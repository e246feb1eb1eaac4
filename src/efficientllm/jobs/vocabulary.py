"""The vocabulary of a run: its tokens counted, some taken out between two steps, and the text encoded anew.

That ends a segment: the loop goes on with batches that are a pure function of (seed, step, tokenizer).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from efficientllm.data.corpus import Corpus
from efficientllm.errors import UsageError
from efficientllm.evaluation.validation import spread
from efficientllm.jobs.finish import generation_settings
from efficientllm.jobs.job import Job
from efficientllm.jobs.text import check_can_shed, read_text
from efficientllm.models.loading import load_config
from efficientllm.models.vocabulary import cut_tokenizer, named_ids
from efficientllm.training.compaction import Compaction, shed
from efficientllm.training.gradient import token_ids
from efficientllm.training.loop import StepRecord
from efficientllm.training.state import TrainState
from efficientllm.training.vocabulary import Vocabulary, with_amounts, with_tokens

COUNTED = 1 << 26  # tokens of a source that are counted, of rows spread over it
ROWS_AT_ONCE = 1024


def vocabulary_of(job: Job) -> Vocabulary | None:
    """None where the recipe lets no tokens fall."""
    recipe, config, settings = job.recipe, job.plan.source, generation_settings(job)
    if recipe.prune is None or not recipe.prune.vocabulary or job.pruning is None:
        return None
    named = named_ids(config.to_dict()) | named_ids(settings.to_dict() if settings else {})
    return Vocabulary(
        with_amounts(recipe, job.pruning),
        config,
        job.tokenizer,
        source_rows=load_config(recipe.source).vocab_size,
        held=named,
        counts=partial(token_counts, job.training, config.vocab_size),
        precision=job.precision,
    )


def token_counts(corpora: Sequence[Corpus], rows: int) -> np.ndarray:
    """How often each of so many tokens is seen in the mixture, fp64 (rows,), as a share of all. Every token counts half
    a time more than it is seen (Krichevsky and Trofimov 1981): one that a small corpus lacks is rare, not unknown."""
    shares, seen, weights = np.zeros(rows), 0, sum(corpus.weight for corpus in corpora)
    for corpus in corpora:
        counts, length = np.zeros(rows, np.int64), token_ids(corpus.take([0])).shape[1]
        indices = spread(len(corpus), max(1, COUNTED // length))
        for first in range(0, len(indices), ROWS_AT_ONCE):
            ids = token_ids(corpus.take(indices[first : first + ROWS_AT_ONCE]))
            counts += np.bincount(ids.flatten().numpy(), minlength=rows)
        shares += corpus.weight / weights * counts / counts.sum()
        seen += int(counts.sum())
    return shares + 0.5 / seen


def without_others(job: Job, kept: Tensor, say: Callable[[str], None]) -> Job:
    """The job with these of its tokens alone, int64 in rising order. A collective: the first process of each node
    encodes, the others find the text in its cache. Raises UsageError for a recipe that cannot go on with them."""
    ranks = job.ranks
    ranks.together(lambda: check_goes_on(job))
    with ranks.patience():
        tokenizer, plan = cut_tokenizer(job.tokenizer, kept), with_tokens(job.plan, kept)
    read = partial(read_text, plan, tokenizer, say)
    first = ranks.together(lambda: read() if ranks.local_rank == 0 else None)
    training, validation, batches = ranks.together(lambda: first or read())
    return replace(
        job,
        tokenizer=tokenizer,
        plan=plan,
        batches=batches,
        training=training,
        validation=validation,
        tokens=kept if job.tokens is None else job.tokens[kept],
    )


def check_goes_on(job: Job) -> None:
    """Raises UsageError where tokens have fallen, perhaps by another recipe, and this one needs all of them."""
    why = "the run that this one goes on from has lost tokens, which"
    check_can_shed(job.tokenizer, job.training, why, mend="train on text")
    if job.recipe.distill:
        raise UsageError(
            "the run that this one goes on from has lost tokens, and a teacher speaks another vocabulary: leave out "
            "distill"
        )


def shed_tokens(
    job: Job, state: TrainState, record: StepRecord, vocabulary: Vocabulary, say: Callable[[str], None]
) -> tuple[Job, StepRecord]:
    """Carries out what the step has decided: the job that goes on, and the step with its change of shape."""
    assert record.prune is not None
    assert record.prune.vocabulary is not None
    began, rows = time.perf_counter(), job.plan.source.vocab_size
    widths, allocated = state.space.widths, state.allocated_parameters
    if record.compaction:
        widths, allocated = record.compaction.before, record.compaction.allocated_before
    kept = vocabulary.kept(record.prune.vocabulary)
    job = without_others(job, kept, say)
    assert job.pruning is not None
    shed(state, kept, job.recipe.train, job.pruning)
    seconds = time.perf_counter() - began
    changed = Compaction(
        widths, state.space.widths, allocated, state.allocated_parameters, seconds, vocabulary=(rows, len(kept))
    )
    say(
        f"{rows - len(kept):,} of {rows:,} tokens have fallen: losses from here on are of other tokens, and compare "
        "with those before in bits per byte"
    )
    return job, replace(record, compaction=changed, seconds=record.seconds + seconds)
