"""Experts of a small mixture: the loop against REAP's rule one-shot, at equal tokens.

    python benchmarks/moe.py FOLDER [--source-tokens 400K] [--tokens 100K] [--arms loop,one-shot:reap] [--seeds 2]

The source is a Qwen3-MoE of half a million parameters (4 layers, hidden 64, 8 experts of 64 channels, 2 of them a
token, vocabulary 1,024, tied), trained here on modules of the running Python's standard library with the load-balancing
loss; half of its experts fall. Finished stages and runs are not repeated.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

import yaml
from transformers import Qwen3MoeConfig

from efficientllm.cli import main as efficientllm
from efficientllm.config import Recipe
from efficientllm.demo.corpus import train_tokenizer, write_corpus
from efficientllm.files import atomic_path
from efficientllm.jobs.prune import run
from efficientllm.models.loading import load_tokenizer
from efficientllm.sizes import parse_count

CHARACTERS = 4_000_000  # of the library's modules, in alphabetical order
VOCABULARY, LENGTH = 1024, 128
LR = 4e-3


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write_text(folder: Path) -> Path:
    corpus = folder / "corpus"
    if not corpus.is_dir():
        with atomic_path(corpus) as partial:
            library, size = partial / "library", 0
            library.mkdir()
            for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
                if size < CHARACTERS:
                    size += (library / file.name).write_bytes(file.read_bytes())
            write_corpus(partial, library=library)
            train_tokenizer([partial / "train.jsonl"], VOCABULARY, partial / "tokenizer")
    return corpus


def write_architecture(folder: Path, corpus: Path) -> Path:
    start = folder / "architecture"
    if not start.is_dir():
        tokenizer = load_tokenizer(str(corpus / "tokenizer"))
        config = Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with atomic_path(start) as partial:
            config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return start


def recipe_of(folder: Path, name: str, source: Path, tokens: int) -> dict[str, Any]:
    corpus = folder / "corpus"
    return {
        "source": str(source),
        "data": {
            "train": str(corpus / "train.jsonl"),
            "validation": str(corpus / "validation.jsonl"),
            "sequence_length": LENGTH,
            "cache_dir": str(folder / "cache"),
            "workers": 1,
        },
        "train": {"tokens": tokens, "batch_tokens": 1024, "micro_batch": 8, "lr": LR},
        "run": {"dir": str(folder / name), "report": False, "validation_tokens": 16_384, "validate_every": "100%"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source-tokens", default="400K")
    parser.add_argument("--tokens", default="100K")
    parser.add_argument("--arms", default="loop,one-shot:reap")
    parser.add_argument("--seeds", default="2")
    parser.add_argument("--lr-grid", default="0.5")
    arguments = parser.parse_args()
    folder = arguments.folder
    start = write_architecture(folder, write_text(folder))
    source = recipe_of(folder, "source", start, parse_count(arguments.source_tokens)) | {"init": "random"}
    run(Recipe.model_validate(source), say)
    recipe = recipe_of(folder, "run", folder / "source" / "model", parse_count(arguments.tokens))
    recipe["prune"] = {"target": {"experts": 4}, "types": ["expert"]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    options = {"arms": arguments.arms, "seeds": arguments.seeds, "lr-grid": arguments.lr_grid}
    options |= {"out": str(folder / "compare")}
    efficientllm(["compare", str(path), *(part for name, value in options.items() for part in (f"--{name}", value))])


if __name__ == "__main__":
    main()
