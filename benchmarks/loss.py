"""Four ways to the loss of a large vocabulary: seconds and peak memory in fresh processes, error against fp64.

    python benchmarks/loss.py [--tokens 2048] [--vocabulary 32768] [--width 256] [--chunk 256]
                              [--repeats 3] [--json FILE]

Loss and gradients of hidden states (tokens, width) and an fp32 head (vocabulary, width), in fp32 and in bf16, on one
thread. plain: all logits at once. recomputed: chunk by chunk under torch.utils.checkpoint. ours:
training/chunked_loss.py. torch: torch.nn.functional.linear_cross_entropy with the same chunks, where this torch has it.
Peak: what the process's high-water mark (VmHWM of Linux) rises by, with glibc told to hand freed tensors back at once.
Errors are relative, of the loss and of both gradients in the L2 norm, on 500 tokens and a vocabulary of 8,000.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from efficientllm.training.chunked_loss import linear_cross_entropy

KINDS = ["plain", "recomputed", "ours", "torch"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight.to(hidden.dtype)).float()
    return functional.cross_entropy(logits, labels, reduction="sum")


def recomputed(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    total = torch.zeros(())
    for part, own in parts:
        total = total + checkpoint(plain, part, weight, own, use_reentrant=False)
    return total


def pytorchs_own(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    return functional.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels, reduction="sum", options=options)


def loss_by(kind: str, chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if kind == "plain":
        return plain
    way = {"recomputed": recomputed, "ours": linear_cross_entropy, "torch": pytorchs_own}[kind]
    return lambda hidden, weight, labels: way(hidden, weight, labels, chunk)


def held(key: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def drawn(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head, labels; every seventh token has none."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, width, generator=draw)).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=draw)
    return hidden, weight, labels.masked_fill(torch.arange(tokens) % 7 == 6, -100)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients in fp64."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    return float(loss.detach()), *torch.autograd.grad(loss, (hidden, weight))


def errors(kind: str, dtype: str, width: int, chunk: int) -> dict[str, float]:
    """Of a small problem, relative to fp64."""
    hidden, weight, labels = drawn(500, 8000, width, DTYPES[dtype])
    loss = loss_by(kind, chunk)(hidden, weight, labels)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    wanted, *references = exact(hidden, weight, labels)
    apart = [float((own - other).norm() / other.norm()) for own, other in zip(gradients, references, strict=True)]
    return {"loss": abs(float(loss.detach()) / wanted - 1), "hidden": apart[0], "weight": apart[1]}


def measure(kind: str, dtype: str, tokens: int, vocabulary: int, width: int, chunk: int) -> dict[str, float]:
    """Seconds and peak, in this process."""
    torch.set_num_threads(1)
    way = loss_by(kind, chunk)
    way(*drawn(100, 64, 16, DTYPES[dtype])).backward()  # libraries and kernels are there already
    tensors = drawn(tokens, vocabulary, width, DTYPES[dtype])
    Path("/proc/self/clear_refs").write_text("5")
    before, began = held("VmRSS"), time.perf_counter()
    way(*tensors).backward()
    return {"seconds": time.perf_counter() - began, "peak_mb": (held("VmHWM") - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 2048, "vocabulary": 32768, "width": 256, "chunk": 256, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help="measure one process (used by this script itself)")
    arguments = parser.parse_args()
    shape = (arguments.tokens, arguments.vocabulary, arguments.width, arguments.chunk)
    if arguments.one:
        print(json.dumps(measure(*arguments.one.split(), *shape)))
        return
    kinds = [kind for kind in KINDS if kind != "torch" or hasattr(functional, "linear_cross_entropy")]
    results: dict[str, dict[str, float]] = {}
    print("| loss | seconds | peak, MB | error of the loss | of hidden gradients | of the head's gradient |")
    print("| --- | --- | --- | --- | --- | --- |")
    flags = [f"--{key}={getattr(arguments, key)}" for key in ("tokens", "vocabulary", "width", "chunk")]
    for dtype in DTYPES:
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(arguments.repeats):
            for kind in kinds:
                command = [sys.executable, __file__, "--one", f"{kind} {dtype}", *flags]
                env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
                out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
                runs[kind].append(json.loads(out))
        for kind, found in runs.items():
            row = {key: statistics.median(run[key] for run in found) for key in found[0]}
            row |= errors(kind, dtype, arguments.width, arguments.chunk)
            results[f"{kind}, {dtype}"] = row
            apart = " | ".join(f"{row[key]:.1e}" for key in ("loss", "hidden", "weight"))
            print(f"| {kind}, {dtype} | {row['seconds']:.2f} | {row['peak_mb']:.0f} | {apart} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
