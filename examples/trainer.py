"""Pruning inside transformers' Trainer: one callback.

    python examples/trainer.py
    torchrun --nproc-per-node 2 examples/trainer.py    # copies; FSDP2 by fsdp=True, fsdp_config={"fsdp_version": 2}

A toy Llama on a repeating pattern, so that it runs anywhere in seconds; give the Trainer your own model and data. With
TRL it is SFTTrainer and SFTConfig instead, and nothing else. Stopped, a run goes on from the newest checkpoint in
output_dir: Trainer.train(resume_from_checkpoint=True).
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from efficientllm import PruningCallback

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)
model = AutoModelForCausalLM.from_config(config)
rows = [(torch.arange(32) + start) % 64 for start in range(64)]
data = [{"input_ids": row, "labels": row} for row in rows]

with tempfile.TemporaryDirectory() as folder:
    callback = PruningCallback(target="50%", span=0.5)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    callback.pruner.save_pretrained(Path(folder) / "compact")  # rank 0 writes; with sharded weights all must call it
    if arguments.process_index == 0:  # smaller tensors from here on: a Trainer on this folder trains on at that size
        compact = AutoModelForCausalLM.from_pretrained(Path(folder) / "compact")
        print(f"{sum(weight.numel() for weight in compact.parameters()):,} parameters, {callback.pruner.widths}")
