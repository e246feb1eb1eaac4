"""Does `efficientllm plan` tell the truth? Predicted and measured memory of a training step, each in a fresh process.

    python benchmarks/plan.py

Measured: the process's high-water mark (VmHWM of Linux) after three steps of two micro-batches, less what it held
before the model was built. fp32 on the CPU, AdamW as in the loop. glibc is told to hand freed tensors back at once
(MALLOC_MMAP_THRESHOLD_), since what its heap holds on to is none of the step's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

CHILD = """
import json, re, sys, torch
from pathlib import Path
from transformers import LlamaConfig
from efficientllm.config import TrainConfig
from efficientllm.training.gradient import Precision, update
from efficientllm.training.state import start
from efficientllm.training.step import OwnBatches
from efficientllm.models.space import build

def held(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

shape, rows, length, options = json.loads(sys.argv[1])
train = TrainConfig(tokens=10**9, lr=1e-3, micro_batch=rows, batch_tokens=2 * rows * length, **options)
config = LlamaConfig(**shape)
precision = Precision("cpu", False)

class Batches:
    def __init__(self, config, rows, length):
        self.size, self.shape = config.vocab_size, (2 * rows, length)

    def batch(self, step):
        return torch.randint(self.size, self.shape, generator=torch.Generator().manual_seed(step))

def steps(config, rows, length):
    state = start(build(config), train, None)
    passes = OwnBatches(state, Batches(config, rows, length), train, None, precision)
    for state.step in range(3):
        passes.begin()
        passes.own()
        update(state.optimizer, state.model.parameters(), lr=1e-3, clip=1.0)

tiny = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
steps(LlamaConfig(**shape | tiny), 1, 16)  # libraries, threads and kernels are there already
before = held("VmRSS")
steps(config, rows, length)
print(held("VmHWM") - before)
"""
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 49152}
SHAPES = {
    "8 M, 8 x 256": ({"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}, 8, 256, {}),
    "8 M, 8 x 256, recomputed": (
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}, 8, 256,
        {"gradient_checkpointing": True},
    ),
    "40 M, 4 x 512, untied": (
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16384,
         "tie_word_embeddings": False, "num_key_value_heads": 2}, 4, 512, {},
    ),
    "40 M, 1 x 128": (
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16384}, 1, 128, {},
    ),
    "3 M, 4 x 1024, vocabulary 49,152, plain loss": (WIDE, 4, 1024, {"loss": "plain"}),
    "the same, chunked loss": (WIDE, 4, 1024, {"loss": "chunked"}),
}  # fmt: skip
COMMON = {"vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}


def measured(shape: dict[str, object], rows: int, length: int, options: dict[str, object]) -> int:
    """Bytes that three training steps add to a fresh process at most."""
    argument = json.dumps([shape, rows, length, options])
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CHILD, argument], capture_output=True, text=True, check=True, env=env)
    return int(done.stdout)


def predicted(shape: dict[str, object], rows: int, length: int, options: dict[str, object]) -> int:
    from transformers import LlamaConfig

    from efficientllm.config import TrainConfig
    from efficientllm.planning.memory import step_memory

    tokens = {"tokens": 10**9, "batch_tokens": 2 * rows * length}
    train = TrainConfig(lr=1e-3, micro_batch=rows, **options, **tokens)
    return step_memory(LlamaConfig(**shape), train, length, bf16=False).total


def main() -> None:
    print("| model, micro-batch | predicted, MB | measured, MB | predicted / measured |")
    print("| --- | --- | --- | --- |")
    for name, (shape, rows, length, options) in SHAPES.items():
        full = COMMON | shape
        ours, real = predicted(full, rows, length, options), measured(full, rows, length, options)
        print(f"| {name} | {ours / 1e6:.0f} | {real / 1e6:.0f} | {ours / real:.3f} |", flush=True)


if __name__ == "__main__":
    main()
