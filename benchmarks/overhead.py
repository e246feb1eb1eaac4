"""What pruning costs: a pruned step, the whole pruning phase, and memory, each against plain training.

    python benchmarks/overhead.py [--steps 60] [--only step phase memory documents] [--json out.json]

A 2.2 M parameter Llama, batches of 4,096 random tokens, saliency taylor-element. `documents` is a plain step whose
attention stays within documents, by the length of a row, against one whose attention crosses them. Compared runs take
their steps in turn within one process, so that a busy machine slows both; quoted are medians over blocks of 10 steps of
the ratio of their times. Memory is the peak resident size of a fresh
process above its size before the model is built.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig

from efficientllm.config import Recipe
from efficientllm.data.planes import Planes, with_planes
from efficientllm.models.space import build, space_of
from efficientllm.training.gradient import Precision
from efficientllm.training.loop import StepRecord, train_steps
from efficientllm.training.planning import pruning_plan
from efficientllm.training.state import TrainState, start

SEQUENCE, BATCH = 256, 4096
LENGTHS = (256, 1024)
BLOCK = 10
PARTS = ["step", "phase", "memory", "documents"]
DOCUMENT = 128  # tokens of one, on average
SCORES = {"saliency": "taylor-element"}
PHASE: dict[str, object] = SCORES | {"target": "40%", "end": "100%", "curve": "linear", "correction": "none"}


class RandomBatches:
    """length: of a row; within: with the positions and labels of documents of random lengths."""

    def __init__(self, length: int, *, within: bool) -> None:
        self.length, self.within = length, within

    def batch(self, step: int, part: slice = slice(None), /) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 2048, (BATCH // self.length, self.length), generator=generator)[part]
        if not self.within:
            return ids
        ids[torch.rand(ids.shape, generator=generator) < 1 / DOCUMENT] = 2048  # the EOS, for the planes alone
        rows = torch.from_numpy(with_planes(ids.numpy(), None, Planes.POSITIONS, 2048))
        rows[..., :2].clamp_(max=2047)
        return rows


def source() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=512,
        max_position_embeddings=max(LENGTHS),
        tie_word_embeddings=True,
    )


def run(
    steps: int,
    prune: dict[str, object] | None,
    *,
    compacts: bool = True,
    length: int = SEQUENCE,
    within: bool = False,
) -> tuple[TrainState, Iterator[StepRecord]]:
    """A run that begins at the source shape, and its steps. compacts: before its end too."""
    train = {"tokens": steps * BATCH, "batch_tokens": BATCH, "micro_batch": BATCH // length, "lr": 1e-3}
    recipe = Recipe.model_validate(
        {
            "source": "benchmark",
            "data": {"train": "none", "sequence_length": length},
            "train": train,
            "prune": prune,
            "run": {"dir": "none"},
        }
    )
    torch.manual_seed(0)
    model = build(source())
    plan = pruning_plan(recipe, model.config)
    plan = plan if plan is None or compacts else replace(plan, compact_at=1.0)
    state = start(model, recipe.train, plan)
    precision = Precision.choose("fp32", torch.device("cpu"))
    records = train_steps(
        state, RandomBatches(length, within=within), recipe.train, plan, steps=steps, precision=precision
    )
    return state, records


def block_ratios(ours: list[float], plain: list[float]) -> list[float]:
    """Ratio of summed seconds, block by block."""
    return [
        sum(ours[first : first + BLOCK]) / sum(plain[first : first + BLOCK])
        for first in range(0, len(ours) - BLOCK + 1, BLOCK)
    ]


def summary(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "blocks": len(ratios)}


def step_overhead(steps: int) -> dict[str, object]:
    """Saliency every step and one event every step, shapes held fixed, against a plain step."""
    events = SCORES | {"target": "30%", "every": 1}
    runs = {
        "plain": run(steps, None),
        "event": run(steps, events | {"correction": "none"}, compacts=False),
        "corrected": run(steps, events | {"correction": "second-order"}, compacts=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, (_, records) in runs.items():
            seconds[name].append(next(records).seconds)
    assert all(not state.pruner or not state.pruner.finished for state, _ in runs.values()), "pruning ended early"
    return {
        "event": summary(block_ratios(seconds["event"], seconds["plain"])),
        "corrected": summary(block_ratios(seconds["corrected"], seconds["plain"])),
        "plain_step_seconds": statistics.median(seconds["plain"]),
    }


def documents_cost(steps: int) -> dict[str, object]:
    """A step whose attention stays within documents against a plain one, by the length of a row."""
    costs: dict[str, object] = {}
    for length in LENGTHS:
        runs = [run(steps, None, length=length, within=within)[1] for within in (False, True)]
        seconds = [[next(records).seconds for records in runs] for _ in range(steps)]
        plain, ours = (list(each) for each in zip(*seconds, strict=True))
        costs[str(length)] = summary(block_ratios(ours, plain))
    return costs


def phase_cost(steps: int) -> dict[str, float]:
    """The pruning phase to 40 %, compactions included, against as many tokens at the source's shape."""
    plain_state, plain = run(steps, None)
    state, pruned = run(steps, PHASE)
    ours = theirs = live = allocated = compacting = 0.0
    passes = compactions = 0
    for _ in range(steps):
        theirs += next(plain).seconds
        record = next(pruned)
        ours += record.seconds
        passes += record.prune.refreshes if record.prune else 0
        compactions += record.compaction is not None
        compacting += record.compaction.seconds if record.compaction else 0.0
        live += state.live_parameters / plain_state.live_parameters / steps
        allocated += state.allocated_parameters / plain_state.live_parameters / steps
    return {
        "steps": steps,
        "time_ratio": ours / theirs,
        "mean_live_share": live,
        "mean_allocated_share": allocated,
        "refresh_passes": passes,
        "compactions": compactions,
        "compacting_share": compacting / theirs,
    }


def peak_memory(kind: str, steps: int = 12) -> float:
    """MiB above the process's size before the model, in this process; see memory(). Linux."""
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, which a child takes from its parent
    before = peak_resident()
    prune = None if kind == "plain" else PHASE | {"correction": "second-order"}
    for _ in run(steps, prune)[1]:
        pass
    return (peak_resident() - before) / 1024


def peak_resident() -> int:
    """High-water mark of this process's resident memory, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory(repeats: int = 3) -> dict[str, float]:
    """Median peak of fresh processes, plain and pruned in turn."""
    peaks: dict[str, list[float]] = {"plain": [], "pruned": []}
    for _ in range(repeats):
        for kind, values in peaks.items():
            command = [sys.executable, __file__, "--peak", kind]
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            values.append(float(out.stdout))
    ratios = [pruned / plain for pruned, plain in zip(peaks["pruned"], peaks["plain"], strict=True)]
    return {
        "plain_mib": statistics.median(peaks["plain"]),
        "pruned_mib": statistics.median(peaks["pruned"]),
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=["plain", "pruned"], help="measure one process (used by this script itself)")
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_memory(arguments.peak))
        return
    parts: dict[str, Callable[[], object]] = {
        "step": lambda: step_overhead(arguments.steps),
        "phase": lambda: phase_cost(4 * arguments.steps),
        "memory": memory,
        "documents": lambda: documents_cost(arguments.steps),
    }
    results: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "parameters": int(space_of(source()).num_params()),
    }
    for name in arguments.only:
        results[name] = parts[name]()
        print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
