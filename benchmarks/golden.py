"""Does the same run still give the same weights? Three small runs, and the sha256 of the models that they leave.

    python benchmarks/golden.py > BEFORE.json               # about a minute on one core
    python benchmarks/golden.py --compare BEFORE.json       # exit 1, and one sentence for each difference

loop: the defaults on a tied Llama with grouped queries. distilled: a Qwen3 that is pruned at once, with a ladder and
its source as teacher. ranks: the loop on two processes (gloo, CPU), every weight in two shards. A digest is of name,
dtype, shape and bytes of every tensor of a model folder. The last bits of a run hang on the CPU and on torch: files of
two machines say nothing about each other, so that none is kept in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on some CPUs their number changes the last bits

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.utils.logging import disable_progress_bar

from efficientllm.config import Recipe
from efficientllm.demo.corpus import train_tokenizer
from efficientllm.distributed.launch import joined
from efficientllm.jobs import finish
from efficientllm.jobs.prune import run
from efficientllm.models.space import build

VOCABULARY, LENGTH, BATCH = 300, 32, 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 2 * LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SOURCES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False),
}
RUNS: dict[str, dict[str, Any]] = {
    "loop": {"source": "llama"},
    "distilled": {
        "source": "qwen3",
        "prune": {"target": "40%", "ladder": ["80%", "60%"], "mode": "one-shot"},
        "distill": {"weight": 0.5},
    },
    "ranks": {"source": "llama", "distributed": {"shard": "full"}},
}
PROCESSES = {"ranks": 2}


def write_world(folder: Path) -> None:
    """Text of random words, a tokenizer of it, and the source models, all of fixed seeds."""
    chooser = random.Random(0)
    words = ["".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=chooser.randint(2, 7))) for _ in range(60)]
    for name, documents in (("train", 200), ("validation", 12)):
        lines = [json.dumps({"text": " ".join(chooser.choices(words, k=80))}) for _ in range(documents)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = train_tokenizer([folder / "train.jsonl"], VOCABULARY, folder / "tokenizer")
    for name, config in SOURCES.items():
        torch.manual_seed(0)
        model = build(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def recipe_of(folder: Path, name: str) -> dict[str, Any]:
    """Thirty steps, pruned over the first half."""
    changes = RUNS[name]
    recipe: dict[str, Any] = {
        "source": str(folder / changes["source"]),
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "sequence_length": LENGTH,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"tokens": 30 * BATCH, "batch_tokens": BATCH, "micro_batch": 4, "lr": 5e-3, "device": "cpu"},
        "prune": {"target": "50%", "end": "50%"},
        "run": {"dir": str(folder / "runs" / name), "trackers": []},
    }
    return recipe | {key: value for key, value in changes.items() if key != "source"}


def work(folder: Path, name: str, rank: int, environment: dict[str, str]) -> None:
    """One process of a run; what it says goes to a file beside the run."""
    os.environ.update(environment)
    with (folder / f"{name}-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        finish.plot_run = lambda *_: None  # the picture takes longer than the run
        with joined() as ranks:
            run(Recipe.model_validate(recipe_of(folder, name)), print, ranks)


def play(folder: Path, name: str) -> dict[str, str]:
    """Runs it in processes of its own, as torchrun would start them; the digest of each model folder that it leaves."""
    world, fork = PROCESSES.get(name, 1), get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        fork.Process(target=work, args=(folder, name, n, shared | {"RANK": str(n), "LOCAL_RANK": str(n)}))
        for n in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(f"{name} failed:\n{(folder / f'{name}-0.log').read_text()[-3000:]}")
    place = folder / "runs" / name
    return {str(file.parent.relative_to(place)): digest(file.parent) for file in sorted(place.rglob("config.json"))}


def digest(model: Path) -> str:
    """Of name, dtype, shape and bytes of every tensor of a model folder."""
    found = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def differences(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """A sentence for each model that is another one, or is on one side only."""
    said = []
    for name in sorted(before.keys() & now.keys()):
        for model in sorted(before[name].keys() | now[name].keys()):
            old, new = before[name].get(model), now[name].get(model)
            if old is None or new is None:
                said.append(f"{name}: {model} is there only {'now' if old is None else 'before'}")
            elif old != new:
                said.append(f"{name}: {model} has other weights than before ({new[:12]}, not {old[:12]})")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--compare", type=Path, metavar="FILE", help="What an earlier run of this program printed.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder))
        found = {name: play(Path(folder), name) for name in arguments.runs}
    print(json.dumps(found, indent=1))
    if arguments.compare:
        said = differences(json.loads(arguments.compare.read_text()), found)
        for sentence in said:
            print(sentence, file=sys.stderr)
        sys.exit(1 if said else 0)


if __name__ == "__main__":
    main()
