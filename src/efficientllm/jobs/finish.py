"""The end of a run: its model, its picture, its summary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from efficientllm import __version__
from efficientllm.checkpoint.export import export_model
from efficientllm.config import dump_recipe
from efficientllm.files import write_json
from efficientllm.jobs.job import Job
from efficientllm.jobs.records import peak_memory
from efficientllm.jobs.validate import validate
from efficientllm.models.generation import listed
from efficientllm.models.loading import load_generation_config
from efficientllm.models.vocabulary import renumbered
from efficientllm.reporting.journal import read_journal, without_nonfinite
from efficientllm.reporting.model_card import write_model_card
from efficientllm.reporting.plots import plot_run
from efficientllm.reporting.progress import RunProgress
from efficientllm.reporting.tables import flops_sentence
from efficientllm.sizes import format_amount, format_count
from efficientllm.training.compaction import compact, compaction_widths
from efficientllm.training.state import TrainState, whole_model

Say = Callable[[str], None]


def finish(job: Job, state: TrainState, source: dict[str, Any], say: Say) -> dict[str, Any]:
    """Exports the model, then writes the summary, whose presence means finished; the picture comes after it."""
    loss = final_loss(job, state)
    if job.pruning and state.pruner and not state.pruner.finished:
        feasible = job.pruning.feasible
        unit, size = feasible.cost.unit, feasible.cost(state.live_widths)
        mend = "let pruning end earlier" if job.recipe.prune and job.recipe.prune.every is None else "lower prune.every"
        say(
            f"the run ended at {format_amount(size, unit)}, above the target of "
            f"{format_amount(feasible.target, unit)}: events are left undone; train longer, or {mend}"
        )
    if job.pruning:
        # Not only where it pays: what is dead must not be in the result, unless its family takes no such shape.
        widths = compaction_widths(state.live_widths, state.space.widths, job.pruning.feasible)
        if widths is not None:
            compact(state, widths, job.recipe.train, job.pruning)
    model = whole_model(state)
    return job.ranks.from_first(lambda: _leave_result(job, state, model, source, loss, say))


def _leave_result(
    job: Job, state: TrainState, model: PreTrainedModel | None, source: dict[str, Any], loss: float, say: Say
) -> dict[str, Any]:
    """What the leading process writes."""
    assert model is not None
    summary = summarize(job, state, source, loss)
    export_model(
        model,
        job.tokenizer,
        job.folder.model,
        generation=generation_settings(job),
        extras=lambda path: write_model_card(path, summary),
    )
    write_json(job.folder.summary, summary)
    say(f"{job.folder.model}: {result_line(summary)}")
    _draw(job.folder.path, say)
    return summary


def _draw(folder: Path, say: Say) -> None:
    """run.png. The run is done and saved: whatever goes wrong here is only said."""
    try:
        if read_journal(folder / "metrics.jsonl"):  # none where a snapshot was left at the very end
            plot_run(folder, folder / "run.png")
    except Exception as error:
        say(f"{folder / 'run.png'} could not be drawn ({error}); the run itself is done: efficientllm report {folder}")


def final_loss(job: Job, state: TrainState) -> float:
    """The validation loss after the last step; measured now where a stop came between the two."""
    known = job.ranks.from_first(lambda: _recorded_loss(job, state.step))
    if known is not None:
        return known
    with RunProgress(0, description="result", stream=job.stream) as progress:
        return validate(job, state, progress)


def _recorded_loss(job: Job, step: int) -> float | None:
    for record in read_journal(job.folder.metrics.path)[-1:]:
        if record["step"] == step and "validation_loss" in record:
            loss = record["validation_loss"]
            return math.nan if loss is None else float(loss)  # null is how a journal writes what is not finite
    return None


def generation_settings(job: Job) -> GenerationConfig | None:
    """Those of the source's authors, stopping also at the end of text of a tokenizer that the recipe brings."""
    settings = load_generation_config(job.recipe.source)
    if settings and job.tokens is not None:
        settings.update(**renumbered(settings.to_dict(), job.tokens))
    end = job.tokenizer.eos_token_id
    if settings is None or job.recipe.tokenizer is None or end is None:
        return settings
    stops = listed(settings.eos_token_id)
    settings.eos_token_id = stops if end in stops else [*stops, end]
    return settings


def summarize(job: Job, state: TrainState, source: dict[str, Any], loss: float) -> dict[str, Any]:
    metrics = read_journal(job.folder.metrics.path)
    return {
        "source": source,
        "result": {
            "path": str(job.folder.model),
            "parameters": state.allocated_parameters,
            "widths": state.space.widths.record(),
            "validation_loss": loss,
            **job.in_its_tokens(loss),
        },
        "tokens": state.tokens,
        "refresh_tokens": state.refresh_tokens,
        "flops": without_nonfinite(state.flops.total),
        "flops_by_part": without_nonfinite(asdict(state.flops)),
        "skipped_steps": state.skipped_steps,
        "target_reached": state.pruner.finished if state.pruner else None,
        "events": len(read_journal(job.folder.events.path)),
        "compactions": len(read_journal(job.folder.compactions.path)),
        "seconds": sum(record["seconds"] for record in metrics),
        # Of all processes that the run has had: after the widest steps it may have been resumed.
        "peak_memory_bytes": max([peak_memory(job.device), *(line.get("peak_memory_bytes", 0) for line in metrics)]),
        "efficientllm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recipe": dump_recipe(job.recipe),
    }


def result_line(summary: dict[str, Any]) -> str:
    source, result = summary["source"], summary["result"]
    spent = f"; {flops_sentence(summary['flops_by_part'])}" if "flops_by_part" in summary else ""
    key, said = "validation_loss", "validation loss"
    if "validation_bits_per_byte" in result:  # of other tokens than the source's
        key, said = "validation_bits_per_byte", "validation bits per byte"
    known = f"{source[key]:.4f}" if key in source else "not measured"  # the source of a resumed run that had no vocab
    return (
        f"{format_count(result['parameters'])} parameters, {said} {result[key]:.4f} "
        f"(source: {format_count(source['parameters'])}, {known}){spent}"
    )
