"""Equal-budget comparison on books: a tokenizer and a source model trained on them, then `efficientllm compare`.

    python benchmarks/comparison.py FOLDER --books DIR [--tokens 300K] [--arms ...] [--seeds 3] [--budget tokens,flops]

DIR holds train-*.parquet and validation-*.parquet with a column `text`. The source is the demo's 1.1 M parameter Llama
(4 layers, hidden 128, 4 heads of 32, FFN 384, vocabulary 2,048, tied). Finished stages and runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import yaml

from efficientllm.cli import main as efficientllm
from efficientllm.config import Recipe
from efficientllm.demo.corpus import train_tokenizer
from efficientllm.demo.story import DemoSize, stage_recipe, write_architecture
from efficientllm.files import atomic_path
from efficientllm.jobs.prune import run
from efficientllm.sizes import parse_count

SIZE = DemoSize(validation_tokens=131_072)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write_text(folder: Path, books: Path) -> Path:
    """Books as JSON lines and a tokenizer trained on them, once."""
    corpus = folder / "corpus"
    if not corpus.is_dir():
        with atomic_path(corpus) as partial:
            for split in ("train", "validation"):
                with (partial / f"{split}.jsonl").open("w") as file:
                    for path in sorted(books.glob(f"{split}-*.parquet")):
                        for text in parquet.read_table(path, columns=["text"])["text"].to_pylist():
                            file.write(json.dumps({"text": text}) + "\n")
            train_tokenizer([partial / "train.jsonl"], SIZE.vocabulary, partial / "tokenizer")
    return corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--source-tokens", default="3M")
    parser.add_argument("--tokens", default="300K")
    parser.add_argument("--target", default="40%")
    parser.add_argument("--arms", default="")
    parser.add_argument("--seeds", default="3")
    parser.add_argument("--budget", default="tokens,flops")
    parser.add_argument("--lr-grid", default="0.5,1,2")
    arguments = parser.parse_args()
    folder = arguments.folder
    start = write_architecture(folder, write_text(folder, arguments.books), SIZE)
    recipe = stage_recipe(folder, "source", start, parse_count(arguments.source_tokens), SIZE) | {"init": "random"}
    run(Recipe.model_validate(recipe), say)
    recipe = stage_recipe(folder, "run", folder / "source" / "model", parse_count(arguments.tokens), SIZE)
    recipe["train"] |= {"lr": 2e-3}
    recipe["run"] |= {"validate_every": "20%", "checkpoint_every": "100%"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"prune": {"target": arguments.target}}))
    length = "" if arguments.tokens == parser.get_default("tokens") else f"-{arguments.tokens}"
    out = folder / f"compare-{arguments.target.rstrip('%')}{length}"
    options = {"arms": arguments.arms, "seeds": arguments.seeds, "budget": arguments.budget}
    options |= {"lr-grid": arguments.lr_grid, "out": str(out)}
    efficientllm(["compare", str(path), *(part for name, value in options.items() for part in (f"--{name}", value))])


if __name__ == "__main__":
    main()
