"""Pruning in a loop of your own: two calls around the optimizer's step.

    python examples/any_loop.py [MODEL_FOLDER]

Without a folder it trains a toy Llama on a repeating pattern, so that it runs anywhere in seconds.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from efficientllm import Pruner

torch.manual_seed(0)
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
pruner = Pruner(model, optimizer, target="50%", steps=40)

for step in range(80):
    start = torch.randint(0, 64, (8, 1))
    ids = (start + torch.arange(32)) % 64
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    pruner.observe()  # saliency from the gradients that training has just computed
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    pruner.step()  # zero the next groups when the schedule says so
    if step == 20:
        model, optimizer = pruner.compact()  # optional: from here on the tensors are smaller
    if step % 10 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}  {pruner.parameters:,} parameters  {pruner.widths}")

with tempfile.TemporaryDirectory() as folder:
    pruner.save_pretrained(Path(folder) / "compact")
    compact = AutoModelForCausalLM.from_pretrained(Path(folder) / "compact")
    print(f"saved and loaded again: {sum(weight.numel() for weight in compact.parameters()):,} parameters")
