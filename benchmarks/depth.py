"""How much of the package a training step passes through: functions, files, and frames down to the model.

    python benchmarks/depth.py [-v]

A step of a tiny Llama without pruning, and one with all of it: looks, events, correction, compaction, and
the checkpoint after it. Comprehensions and lambdas count as part of the function that they stand in. -v: names all.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

import efficientllm
from efficientllm.checkpoint.store import save
from efficientllm.config import Recipe
from efficientllm.models.space import build
from efficientllm.training.gradient import Precision
from efficientllm.training.loop import train_steps
from efficientllm.training.planning import pruning_plan
from efficientllm.training.state import capture, start

SOURCE, ROWS, LENGTH = Path(efficientllm.__file__).parent, 8, 64
SHAPE = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
PRUNE = {"target": "50%", "start": 0, "end": "50%", "curve": "linear", "floors": {"intermediate": 8}, "align": 1}


def passed(body: Callable[[], object]) -> tuple[set[tuple[str, str]], list[str]]:
    """(file, function) of ours that run while a body does; those between train_steps and its first forward pass."""
    seen: set[tuple[str, str]] = set()
    way: list[str] = []

    def watch(frame: FrameType | None, kind: str, _: Any) -> None:
        assert frame is not None
        code = frame.f_code
        if kind == "call" and Path(code.co_filename).is_relative_to(SOURCE) and "<" not in code.co_name:
            seen.add((str(Path(code.co_filename).relative_to(SOURCE)), code.co_qualname))
        elif kind == "call" and not way and code.co_qualname.endswith("ForCausalLM.forward"):
            while frame is not None and frame.f_code is not train_steps.__code__:
                way.extend([frame.f_code.co_qualname] if str(SOURCE) in frame.f_code.co_filename else [])
                frame = frame.f_back

    sys.setprofile(watch)
    try:
        body()
    finally:
        sys.setprofile(None)
    return seen, way[::-1]


def step(folder: str, prune: dict[str, object] | None) -> tuple[set[tuple[str, str]], list[str]]:
    """The second step of a run, and a checkpoint after it where it prunes."""
    train = {"tokens": 4 * ROWS * LENGTH, "batch_tokens": ROWS * LENGTH, "micro_batch": ROWS, "lr": 1e-3}
    made = {"source": "none", "data": {"train": "none", "sequence_length": LENGTH}, "run": {"dir": "none"}}
    recipe, cpu = Recipe.model_validate(made | {"train": train, "prune": prune}), Precision("cpu", bf16=False)
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (32, LENGTH))
    model = build(LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2))
    plan = pruning_plan(recipe, model.config)
    state = start(model, recipe.train, plan)
    batches: Any = SimpleNamespace(batch=lambda step, part=slice(None): ids[step : step + ROWS][part])
    steps = train_steps(state, batches, recipe.train, plan, steps=4, precision=cpu)
    next(steps)
    return passed(lambda: (next(steps), plan and save(Path(folder), capture(state))))


if __name__ == "__main__":
    for name, prune in (("plain", None), ("pruned", PRUNE)):
        with tempfile.TemporaryDirectory() as folder:
            seen, way = step(folder, prune)
        print(f"{name}: {len(seen)} functions, {len({file for file, _ in seen})} files; {' > '.join(way)}")
        for file, function in sorted(seen) if "-v" in sys.argv else ():
            print(f"  {file}: {function}")
