"""transformers' Trainer and TRL's SFTTrainer on several processes, and all that these processes do (`main`)."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from bare_loop import OPTIONS
from conftest import tiny_model
from distributed.loops import HAND, Case, by_hand, place, refusals, warned, write_down
from efficientllm import PruningCallback
from efficientllm.distributed.launch import joined

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


def sft_trainer(model: Any, made: TrainingArguments, *, callbacks: list[TrainerCallback]) -> Any:
    """On the same rows, which TRL pads and masks itself."""
    known = Tokenizer(WordLevel({str(number): number for number in range(61)}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="0", eos_token="0", unk_token="1")
    data = []
    for row in rows():
        held = row["attention_mask"] == 1
        asked = (row["labels"][held] != -100).int()
        data.append({"input_ids": row["input_ids"][held].tolist(), "completion_mask": asked.tolist()})
    made_for: dict[str, Any] = {"train_dataset": Dataset.from_list(data), "processing_class": tokenizer}
    return import_module("trl").SFTTrainer(model, made, callbacks=callbacks, **made_for)


def in_trainer(case: Case, folder: Path) -> None:
    choices = {"saliency": case.saliency, "correction": case.correction} | OPTIONS
    callback = PruningCallback(target="50%", span=0.7, **choices)
    made = arguments(case, folder)
    callbacks: list[TrainerCallback] = [callback, Killed(case.end)]
    plain: Any = partial(Trainer, train_dataset=rows())
    trainer = (sft_trainer if case.sft else plain)(tiny_model(case.family), made, callbacks=callbacks)
    before = folder / f"{case.resume}-{place()[1]}-out" / "checkpoint-3"
    trainer.train(resume_from_checkpoint=str(before) if case.resume else None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    with torch.no_grad():  # FSDP2 leaves some weights gathered after this, in bf16 where it computes so
        trainer.model.eval()(input_ids=rows()[0]["input_ids"][None])
    callback.pruner.save_pretrained(folder / f"{case.name}-{place()[1]}-model")
    write_down(case.name, folder, callback.pruner, [callback.pruner.calls])


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
        said = {"refused": refusals(dist.group.WORLD), "warned": warned(dist.group.WORLD, ranks.leads)}
        (folder / f"said-{ranks.rank}.json").write_text(json.dumps(said))
