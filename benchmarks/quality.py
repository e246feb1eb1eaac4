"""Is the loop better than training its result from scratch? Same shape, same tokens, same batches, several seeds.

    python benchmarks/quality.py FOLDER [--seeds 3] [--source-tokens 3M] [--tokens 1M]

A 2.2 M parameter Llama (4 layers, hidden 192, 6 heads of 32, FFN 512, vocabulary 2,048, tied) is trained on Python's
standard library, then pruned to 40 % while it trains on; the control trains the loop's final shape from a random
start on the very same batches, at two learning rates, of which its better one counts. A seed changes the order of the
batches (and the control's start), not the source. Finished runs under FOLDER are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from efficientllm.config import Recipe
from efficientllm.demo.story import DemoSize, prepare_corpus, stage_recipe, write_architecture
from efficientllm.jobs.prune import run
from efficientllm.sizes import parse_count

SIZE = DemoSize(hidden=192, heads=6, intermediate=512, validation_tokens=262_144)

PRUNE = {"target": "40%"}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def stage(folder: Path, name: str, source: Path, tokens: int, lr: float, seed: int, **more: Any) -> dict[str, Any]:
    recipe = stage_recipe(folder, name, source, tokens, SIZE)
    recipe["train"] |= {"lr": lr, "seed": seed}
    recipe["run"] |= {"validate_every": "25%", "checkpoint_every": "25%"}
    return run(Recipe.model_validate(recipe | more), say)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source-tokens", default="3M")
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--source-lr", type=float, default=3e-3)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--scratch-lr", type=float, nargs="+", default=[2e-3, 4e-3])
    arguments = parser.parse_args()
    folder, tokens = arguments.folder, parse_count(arguments.tokens)
    start = write_architecture(folder, prepare_corpus(folder, SIZE, say), SIZE)
    source_tokens = parse_count(arguments.source_tokens)
    source = stage(folder, "source", start, source_tokens, arguments.source_lr, seed=0, init="random")
    model = folder / "source" / "model"
    rows: list[dict[str, Any]] = []
    for seed in range(1, arguments.seeds + 1):
        loop = stage(folder, f"loop-{seed}", model, tokens, arguments.lr, seed, prune=PRUNE)
        shape = folder / f"loop-{seed}" / "model"
        controls = [
            stage(folder, f"scratch-{seed}-{lr:g}", shape, tokens, lr, seed, init="random")
            for lr in arguments.scratch_lr
        ]
        losses = [control["result"]["validation_loss"] for control in controls]
        rows.append(
            {
                "seed": seed,
                "widths": loop["result"]["widths"],
                "parameters": loop["result"]["parameters"],
                "loop": loop["result"]["validation_loss"],
                "scratch": min(losses),
                "scratch_by_lr": dict(zip(map(str, arguments.scratch_lr), losses, strict=True)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    gaps = [row["scratch"] - row["loop"] for row in rows]
    results = {
        "source": source["result"] | {"path": "source"},
        "tokens": tokens,
        "seeds": rows,
        "gap_mean": statistics.mean(gaps),
        "gap_standard_error": statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
    }
    (folder / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
