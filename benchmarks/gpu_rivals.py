"""The loops of others that benchmarks/gpu.py measures beside ours: transformers' Trainer, and one written by hand."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from gpu_shapes import Shape
from gpu_subjects import RandomRows, synchronise

from efficientllm.models.space import build
from efficientllm.training.gradient import Precision

MOST = 100  # rounds for which the Trainer is given data


def plain_loop(shape: Shape, device: torch.device) -> Callable[[], float]:
    """A loop as transformers' examples have it (run_clm_no_trainer.py), under autocast; takes one step, in seconds."""
    model: Any = build(shape.config, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    batches, precision, count = RandomRows(shape), Precision(device.type, device.type == "cuda"), 0

    def step() -> float:
        nonlocal count
        synchronise(device)
        began, count = time.perf_counter(), count + 1
        parts = batches.batch(count).to(device).split(shape.micro)
        for rows in parts:
            with precision.context():
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        return time.perf_counter() - began

    return step


def beside_trainer(
    shape: Shape, device: torch.device, takes: Mapping[str, Callable[[], float]], turns: Iterator[int]
) -> dict[str, list[float]]:
    """Seconds of the Trainer's steps and of each of `takes`, in turn; the first two rounds are left out.

    A Trainer's step is from the end of the others' to its on_step_end, so with its own fetching of data. turns: yields
    once for every round that is to be taken.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *takes)}
    most = 2 + MOST

    class InTurn(TrainerCallback):
        began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronise(device)
            seconds["trainer"].append(time.perf_counter() - self.began)
            for name, take in takes.items():
                seconds[name].append(take())
            if len(seconds["trainer"]) >= 2 and next(turns, None) is None:
                control.should_training_stop = True
            self.began = time.perf_counter()

    batches = RandomRows(shape)
    rows = [row for step in range(most) for row in batches.batch(step)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=most,
            per_device_train_batch_size=shape.micro,
            gradient_accumulation_steps=shape.rows // shape.micro,
            learning_rate=1e-4,
            weight_decay=0.05,
            lr_scheduler_type="constant",
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        arguments._n_gpu = 1  # else it splits a batch over all GPUs of the machine (DataParallel)
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(build(shape.config, device), arguments, train_dataset=data, callbacks=[InTurn()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {name: values[2:] for name, values in seconds.items()}
