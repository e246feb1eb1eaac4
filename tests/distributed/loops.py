"""Other people's loops on several processes (`main`): by hand and in transformers' Trainer. Every rank writes down what
comes out; a single process takes the same path by `by_hand(case, FOLDER)` and `in_trainer(case, FOLDER)`.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from conftest import tiny_model
from efficientllm import Pruner, PruningCallback
from efficientllm.distributed.launch import joined
from efficientllm.errors import UsageError
from efficientllm.pruning.shards import whole

OPTIONS: dict[str, Any] = {"floors": {"intermediate": 8}, "align": 4, "bound": 0.05}
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
TRAINER = [
    Case("trainer-copies", correction="none"),
    Case("trainer-bf16", bf16=True, family="llama-mha-tied"),
    Case("trainer-shards", family="qwen3-gqa", shards=True, correction="none"),
    Case("trainer-shards-tied", family="qwen2-gqa-tied", shards=True, bf16=True),
]
SFT = [
    Case("sft-copies", sft=True, correction="none"),
    Case("sft-shards", sft=True, family="qwen3-gqa", shards=True, correction="none"),
]


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(500 + step))


def write_down(name: str, folder: Path, pruner: Pruner, events: list[Any]) -> None:
    tensors = {}
    for key, weight in pruner.model.named_parameters():
        tensors[key] = whole(weight).clone()
        moments = pruner.optimizer.state[weight]
        tensors |= {f"{moment}|{key}": whole(value).clone() for moment, value in moments.items()}
    tensors |= {f"average|{key}": value for key, value in pruner.state_dict()["tensors"].items()}
    rank, world = place()
    save_file(tensors, folder / f"{name}-{world}-{rank}.safetensors")
    (folder / f"{name}-{world}-{rank}.json").write_text(json.dumps([events, pruner.widths.record()]))


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


class Killed(TrainerCallback):
    """SIGKILL to itself at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step > 0:
            os.kill(os.getpid(), signal.SIGKILL)


def rows() -> list[dict[str, torch.Tensor]]:
    """Of unequal length, padded, their first tokens not in the loss."""
    made, generator = [], torch.Generator().manual_seed(7)
    for ids in torch.randint(1, 61, (96, 12), generator=generator):
        length, asked = torch.randint(6, 13, (2,), generator=generator).tolist()
        mask, labels = (torch.arange(12) < length).long(), ids.clone()
        labels[length:] = -100
        labels[: asked // 3] = -100
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def arguments(case: Case, folder: Path, **changes: Any) -> TrainingArguments:
    if case.shards and place()[1] > 1:
        layers = [f"{case.family.split('-')[0].capitalize()}DecoderLayer"]
        changes |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": layers}}
    options: dict[str, Any] = {
        "max_steps": 10, "per_device_train_batch_size": 8 // place()[1], "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "bf16": case.bf16, "save_steps": 3,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    kind: Any = import_module("trl").SFTConfig if case.sft else TrainingArguments
    made: TrainingArguments = kind(output_dir=str(folder / f"{case.name}-{place()[1]}-out"), **(options | changes))
    if "fsdp" in changes:
        as_on_a_gpu(made)
    return made


def as_on_a_gpu(made: TrainingArguments) -> None:
    """accelerate 1.15 passes over an FSDP plugin on CPUs and makes copies instead (state.py: MULTI_CPU is not among the
    kinds that may become FSDP); all that comes after that one choice runs on a CPU as it stands."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert made.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def sft_trainer(model: Any, made: TrainingArguments, callbacks: list[TrainerCallback]) -> Any:
    """On the same rows, which TRL pads and masks itself."""
    known = Tokenizer(WordLevel({str(number): number for number in range(61)}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="0", eos_token="0", unk_token="1")
    data = []
    for row in rows():
        held = row["attention_mask"] == 1
        asked = (row["labels"][held] != -100).int()
        data.append({"input_ids": row["input_ids"][held].tolist(), "completion_mask": asked.tolist()})
    data = Dataset.from_list(data)
    kind: Any = import_module("trl").SFTTrainer
    return kind(model, made, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)


def in_trainer(case: Case, folder: Path) -> None:
    choices = {"saliency": case.saliency, "correction": case.correction} | OPTIONS
    callback = PruningCallback(target="50%", span=0.7, **choices)
    made = arguments(case, folder)
    trainer = Trainer(tiny_model(case.family), made, train_dataset=rows(), callbacks=[callback, Killed(case.end)])  # type: ignore[arg-type]
    before = folder / f"{case.resume}-{place()[1]}-out" / "checkpoint-3"
    trainer.train(resume_from_checkpoint=str(before) if case.resume else None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    with torch.no_grad():  # FSDP2 leaves some weights gathered after this, in bf16 where it computes so
        trainer.model.eval()(input_ids=rows()[0]["input_ids"][None])
    callback.pruner.save_pretrained(folder / f"{case.name}-{place()[1]}-model")
    write_down(case.name, folder, callback.pruner, [callback.pruner.calls])


def refusals(folder: Path) -> list[str]:
    """What is said to several processes that do not say enough, or whose weights lie in another way."""
    model, said = tiny_model("llama-gqa"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    split = tiny_model("llama-gqa")
    down: Any = split.model.layers[0].mlp.down_proj
    mesh = init_device_mesh("cpu", (place()[1],))
    down.weight = torch.nn.Parameter(distribute_tensor(down.weight.detach(), mesh, [Shard(1)]))
    part = tiny_model("llama-gqa")
    fully_shard(part.model.layers[0], mesh=mesh)
    sharded = tiny_model("llama-gqa")
    fully_shard(sharded, mesh=mesh)
    group = dist.group.WORLD
    for attempt in (
        lambda: Pruner(model, optimizer, target="50%", steps=4),
        lambda: Pruner(split, optimizer, target="50%", steps=4, process_group=group),
        lambda: Pruner(part, optimizer, target="50%", steps=4, process_group=group),
        lambda: Pruner(
            sharded, torch.optim.AdamW(sharded.parameters()), target="50%", steps=4, process_group=group
        ).compact(),
    ):
        try:
            attempt()
        except (UsageError, ValueError) as error:
            said.append(str(error))
    return said


def killed(folder: Path) -> None:
    with joined():
        in_trainer(replace(TRAINER[0], name="killed", end=5), folder)


def main(folder: Path) -> None:
    with joined() as ranks:
        for case in HAND:
            by_hand(case, folder)
        in_trainer(replace(TRAINER[0], name="trainer-copies-resumed", resume="killed"), folder)
        sft = SFT if find_spec("trl") else []
        for case in (*TRAINER, *sft):
            in_trainer(case, folder)
        for case in (*TRAINER[1:], *sft):
            in_trainer(replace(case, name=f"{case.name}-resumed", resume=case.name), folder)
        (folder / f"refused-{ranks.rank}.json").write_text(json.dumps(refusals(folder)))


def loaded(folder: Path, name: str, world: int) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / f"{name}-{world}-model")
