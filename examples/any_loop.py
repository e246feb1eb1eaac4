"""Pruning in a loop of your own: two calls around the optimizer's step.

    python examples/any_loop.py [MODEL_FOLDER]
    torchrun --nproc-per-node 2 examples/any_loop.py [MODEL_FOLDER]    # each process has its rows of every batch

Without a folder it trains a toy Llama on a repeating pattern, so that it runs anywhere in seconds.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from efficientllm import Pruner

several = "RANK" in os.environ  # set by torchrun
if several:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

torch.manual_seed(0)  # the same weights and batches on every process
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
pruner = Pruner(model, optimizer, target="50%", steps=40, process_group=dist.group.WORLD if several else None)
trained = DistributedDataParallel(model) if several else model

for step in range(80):
    start = torch.randint(0, 64, (8, 1))
    ids = (start + torch.arange(32)) % 64
    ids = ids.chunk(world)[rank]
    loss = trained(input_ids=ids, labels=ids).loss
    loss.backward()
    pruner.observe()  # saliency from the gradients that training has just computed
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    pruner.step()  # zero the next groups when the schedule says so
    if step == 50:  # pruning is finished
        model, optimizer = pruner.compact()  # optional: from here on the tensors are smaller
        trained = DistributedDataParallel(model) if several else model
    if step % 10 == 0 and rank == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}  {pruner.parameters:,} parameters  {pruner.widths}")

with tempfile.TemporaryDirectory() as folder:  # rank 0 writes; with sharded weights all must call it
    pruner.save_pretrained(Path(folder) / "compact")
    if rank:
        sys.exit()
    compact = AutoModelForCausalLM.from_pretrained(Path(folder) / "compact")
    print(f"saved and loaded again: {sum(weight.numel() for weight in compact.parameters()):,} parameters")
