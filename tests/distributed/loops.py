"""Somebody's own loop on several processes, and what it is told. Every rank writes down what comes out; one process
alone takes the same path by `by_hand(case, FOLDER)`, and `in_trainer(case, FOLDER)` of trainers.py.
"""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState

from bare_loop import OPTIONS
from conftest import tiny_model
from distributed.scenario import tensors_of
from efficientllm import Pruner, PruningCallback
from efficientllm.errors import UsageError

STEPS = 8

SHAPE = {"hidden": 28, "heads": 2, "kv_heads": 1, "intermediate": 32}
MIXED = {"ffn": "wanda", "stem": "gate-fisher", "attention": "taylor-element", "attention_query": "taylor-vector"}


@dataclass(frozen=True)
class Case:
    """shards: FSDP2, else copies (DDP). sft: in TRL's SFTTrainer. end: killed at this step. resume: a checkpoint of the
    case of this name."""

    name: str
    family: str = "llama-gqa"
    shards: bool = False
    saliency: Any = "gate-fisher"
    target: Any = "50%"
    correction: str = "second-order"
    compact: bool = False
    bf16: bool = False
    sft: bool = False
    end: int = 0
    resume: str = ""


HAND = [
    Case("copies", compact=True),
    Case("copies-taylor", family="qwen2-gqa-tied", saliency=MIXED, target=SHAPE, correction="none"),
    Case("shards", family="qwen3-gqa", shards=True),
    Case("shards-taylor", family="llama-mha-tied", saliency="taylor-element", shards=True, correction="none"),
]


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(500 + step))


def write_down(name: str, folder: Path, pruner: Pruner, events: list[Any]) -> None:
    rank, world = place()
    stem = folder / f"{name}-{world}-{rank}"
    save_file(tensors_of(pruner._state), stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps([events, pruner.widths.record()]))


def by_hand(case: Case, folder: Path) -> None:
    """A hand-written loop: two micro-batches a step, clipped before observe()."""
    rank, world = place()
    model: Any = tiny_model(case.family).train()
    if case.shards and world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped = DistributedDataParallel(model) if world > 1 and not case.shards else model
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    choices = {"saliency": case.saliency, "correction": case.correction} | OPTIONS
    group = dist.group.WORLD if world > 1 else None
    pruner = Pruner(wrapped, optimizer, target=case.target, steps=5, process_group=group, **choices)
    exact(pruner)
    events: list[Any] = []
    for step in range(STEPS):
        for last, part in enumerate(batch(step).chunk(2)):
            ids = part.chunk(world)[rank]
            waits = wrapped.no_sync() if wrapped is not model and not last else nullcontext()
            with waits:
                (wrapped(input_ids=ids, labels=ids).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        events += [[each.event.type, each.event.units.tolist()] for each in pruner.step().events]
        if case.compact and step == 1:  # and on: what falls after it is met over the processes too
            model, optimizer = pruner.compact()
            wrapped = DistributedDataParallel(model) if world > 1 else model
            exact(pruner)
    pruner.save_pretrained(folder / f"{case.name}-{world}-model")
    write_down(case.name, folder, pruner, events)


def exact(pruner: Pruner) -> None:
    """Corrections do not stop where rounding says so."""
    options = pruner.engine.options
    if options.correction is not None:
        pruner.engine.options = replace(options, correction=replace(options.correction, tolerance=1e-6))


def pruner_of(model: Any, **more: Any) -> Pruner:
    return Pruner(model, torch.optim.AdamW(model.parameters(), lr=1e-3), target="50%", steps=4, **more)


def refusals(group: Any) -> list[str]:
    """What is said to several processes that do not say enough, or whose weights lie in another way."""
    whole, split, part, sharded = (tiny_model("llama-gqa") for _ in range(4))
    mesh = init_device_mesh("cpu", (place()[1],))
    down: Any = split.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(distribute_tensor(down.weight.detach(), mesh, [Shard(1)]))
    fully_shard(part.model.layers[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    said = []
    for attempt in (
        lambda: pruner_of(whole),
        lambda: pruner_of(split, process_group=group),
        lambda: pruner_of(part, process_group=group),
        lambda: pruner_of(sharded, process_group=group).compact(),
    ):
        try:
            attempt()
        except (UsageError, ValueError) as error:
            said.append(str(error))
    return said


def warned(group: Any, leads: bool) -> list[str]:
    """Of scores that compare types by scale, of an earlier version's, and of events that are left undone."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        callback = PruningCallback(target="50%")
        callback.pruner = pruner_of(tiny_model("llama-gqa"), process_group=group, saliency="wanda")
        state = callback.pruner.state_dict()
        del state["facts"]["saliency_scale"]
        callback.pruner.load_state_dict(state)
        callback.on_train_end(None, TrainerState(is_world_process_zero=leads), None)  # type: ignore[arg-type]
    return [str(each.message) for each in said]
