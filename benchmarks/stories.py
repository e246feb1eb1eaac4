"""Prunes two really trained GQA Llamas and shows what the compact ones write.

    python benchmarks/stories.py FOLDER --models path/to/stories260K path/to/babyllama-0.9M

No children's stories are at hand to train on, so the text is what the first model itself writes: both are
pruned to 60 % while they train on its samples. Prints parameters, validation loss on held-out samples, and a greedy
continuation before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm.config import Recipe
from efficientllm.jobs.prune import run

PROMPT = "Once upon a time, there was a little girl named"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@torch.no_grad()
def sample_corpus(model_folder: Path, folder: Path, batches: int) -> None:
    """train.jsonl and validation.jsonl of sampled stories, 64 a batch."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    start = torch.full((64, 1), tokenizer.bos_token_id)
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in (("train", batches), ("validation", max(1, batches // 12))):
        with (folder / f"{name}.jsonl").open("w") as file:
            for batch in range(number):
                rows = model.generate(start, max_new_tokens=220, do_sample=True, temperature=1.0, top_k=0)
                for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
                    file.write(json.dumps({"text": text}) + "\n")
                say(f"{name}: {batch + 1} of {number} batches of stories")


def write_story(folder: str | Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=80, do_sample=False)[0], skip_special_tokens=True)


def prune(model: Path, folder: Path, tokens: str, target: str) -> dict[str, Any]:
    recipe = {
        "source": str(model),
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "sequence_length": 128,
            "cache_dir": str(folder / "cache"),
            "workers": 2,
        },
        "train": {
            "tokens": tokens,
            "batch_tokens": 2048,
            "micro_batch": 16,
            "lr": 1e-3,
            "warmup": "5%",
            "decay": "30%",
        },
        "prune": {"target": target, "correction": "none"},
        "run": {"dir": str(folder / f"{model.name}-{target.rstrip('%')}")},
    }
    return run(Recipe.model_validate(recipe), say)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--tokens", default="600K")
    parser.add_argument("--target", default="60%")
    arguments = parser.parse_args()
    if not (arguments.folder / "validation.jsonl").exists():
        sample_corpus(arguments.models[0], arguments.folder, arguments.batches)
    for model in arguments.models:
        summary = prune(model, arguments.folder, arguments.tokens, arguments.target)
        source, result = summary["source"], summary["result"]
        print(f"\n{model.name}: {source['parameters']:,} -> {result['parameters']:,} parameters, {result['widths']}")
        print(f"validation loss {source['validation_loss']:.3f} -> {result['validation_loss']:.3f}")
        print(f"  source:  {write_story(model)!r}")
        print(f"  compact: {write_story(result['path'])!r}")


if __name__ == "__main__":
    main()
