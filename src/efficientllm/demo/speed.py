"""How fast the demo's models are: in training once pruning is over, and in a forward pass, which is what counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from efficientllm.models.loading import load_model
from efficientllm.reporting.journal import read_journal

ROUNDS = 9


def speed_once_pruned(folder: Path) -> float | None:
    """Tokens per second of a run's training after its last event; None where it has none, or no step follows it."""
    events = read_journal(folder / "events.jsonl")
    last = max((event["step"] for event in events), default=None)
    after = [line for line in read_journal(folder / "metrics.jsonl") if last is not None and line["step"] > last]
    seconds: float = sum(line["seconds"] for line in after)
    tokens: float = sum(line["tokens_per_second"] * line["seconds"] for line in after)
    return tokens / seconds if seconds else None


@torch.inference_mode()
def forward_speeds(
    models: Mapping[str, Path], rows: int, length: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Tokens per second of each model in a forward pass over rows of `length` tokens with all logits, on the CPU: the
    median of ROUNDS, in each of which every model has its turn, so that what slows the machine slows all of them."""
    loaded = {name: load_model(str(path)).eval() for name, path in models.items()}
    ids = torch.zeros(rows, length, dtype=torch.int64)
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for round_ in range(ROUNDS + 1):
        for name, model in loaded.items():
            began = clock()
            model(input_ids=ids, use_cache=False)
            if round_:  # the first makes room
                seconds[name].append(clock() - began)
    return {name: rows * length / statistics.median(each) for name, each in seconds.items()}
