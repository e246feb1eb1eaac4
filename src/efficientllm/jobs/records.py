"""The lines that a step leaves in the run folder's journals."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from efficientllm.models.process_memory import peak_resident
from efficientllm.pruning.decision import Decided
from efficientllm.pruning.groups import Event
from efficientllm.training.compaction import Compaction
from efficientllm.training.loop import StepRecord
from efficientllm.training.state import TrainState


def metrics_record(
    state: TrainState, record: StepRecord, tokens: int, seconds: float, validation: float | None
) -> dict[str, Any]:
    """One line of metrics.jsonl. Losses in nats per token; tokens and seconds are those since the line before; flops,
    in all and by part (pruning/ledger.py), are those since the run began. peak_memory_bytes: of this process."""
    line: dict[str, Any] = {
        "step": state.step,
        "tokens": state.tokens,
        "loss": record.loss,
        "lr": record.lr,
        "grad_norm": record.grad_norm,
        "live_parameters": state.live_parameters,
        "allocated_parameters": state.allocated_parameters,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(state.device),
        "refresh_tokens": state.refresh_tokens,
        "flops": state.flops.total,
        "flops_by_part": asdict(state.flops),
        "skipped_steps": state.skipped_steps,
        "widths": state.live_widths.record(),
    }
    if record.prune and record.prune.damages:
        line["saliency"] = record.prune.damages
    if record.prune and (record.prune.corrections.done or record.prune.corrections.skipped):
        line["corrections"] = asdict(record.prune.corrections)
    if record.prune and record.prune.nonfinite:
        line["nonfinite"] = record.prune.nonfinite  # looks that pruning left out
    if validation is not None:
        line["validation_loss"] = validation
    return line


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the GPU's memory where it trains there, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = peak_resident()
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def event_records(state: TrainState, record: StepRecord) -> Iterator[dict[str, Any]]:
    """Lines of events.jsonl. units: one a row (-1 in dead rows), counted in the widths allocated at that step. cost,
    saved: of another cost than parameters, and what the event has saved in its unit."""
    for applied in record.prune.events if record.prune else ():
        yield {
            "step": state.step,
            "tokens": state.tokens,
            "type": applied.event.type,
            "units": applied.event.units.tolist(),
            "saliency": applied.event.saliency,
            "damage_per_parameter": applied.event.saliency / applied.removed,
            "parameters_after": applied.parameters,
            "widths": applied.after.widths.record(),
        } | _price(state, applied)


def _price(state: TrainState, applied: Decided[Event]) -> dict[str, Any]:
    """What the event has saved, where the run counts something else than parameters."""
    cost = state.pruner.feasible.cost if state.pruner else None
    return {} if cost is None or cost.name == "params" else {"cost": cost.name, "saved": applied.saved}


def compaction_record(state: TrainState, compaction: Compaction) -> dict[str, Any]:
    """One line of compactions.jsonl. vocabulary: its rows before and after, where some have fallen."""
    line = asdict(compaction) | {"before": compaction.before.record(), "after": compaction.after.record()}
    if compaction.vocabulary is None:
        del line["vocabulary"]
    return {"step": state.step, "tokens": state.tokens} | line
