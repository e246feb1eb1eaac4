"""What helps? Arms that differ from the default loop in one thing, several seeds, equal tokens and batches.

    python benchmarks/ablations.py FOLDER [--seeds 3] [--tokens 400K] [--arms NAME ...] [--table OUT.md]

The demo's 1.1 M parameter Llama (4 layers, hidden 128, 4 heads of 32, FFN 384, vocabulary 2,048, tied) is trained on
Python's standard library, then every arm takes it to 40 % on the very same batches. Seeds change the order of the
batches (and random starts), not the source. Differences to the default loop are paired by seed; the interval is
Student's at 95 %. The default's scores are in nats; those of a "criterion X" arm are not, and
compare types by scale only. Finished runs under FOLDER are not repeated, so that arms can be added.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from efficientllm.comparison.statistics import over_seeds
from efficientllm.config import Recipe
from efficientllm.demo.story import DemoSize, prepare_corpus, stage_recipe, write_architecture
from efficientllm.errors import UsageError
from efficientllm.jobs.prune import run
from efficientllm.models.loading import load_config
from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA, DEFAULT
from efficientllm.pruning.groups import Space
from efficientllm.pruning.widths import Widths
from efficientllm.sizes import parse_count

SIZE = DemoSize(validation_tokens=262_144)
SHAPE = {"target": "the loop's shape"}  # filled in from the default loop of the same seed
PROPORTIONAL = {"target": "proportional"}

ARMS: dict[str, dict[str, Any]] = {
    "loop": {},
    "no correction": {"correction": "none"},
    "one-shot, loop's shape": {"mode": "one-shot"} | SHAPE,
    "one-shot, loop's shape, no correction": {"mode": "one-shot", "correction": "none"} | SHAPE,
    "one-shot, own shape": {"mode": "one-shot"},
    "iterative, own shape": {"mode": "iterative"},
    "from scratch, loop's shape": {},
    "fixed proportional widths": PROPORTIONAL,
    "distilled": {},
    "distilled, hidden states": {},
    "one-shot, loop's shape, distilled": {"mode": "one-shot"} | SHAPE,
    "from scratch, loop's shape, distilled": {},
    **{f"span {share}": {"end": share} for share in ("10%", "25%", "50%", "80%")},
    "curve linear": {"curve": "linear"},
    "curve exponential": {"curve": "exponential"},
    "depth as a fourth type": {"types": ["attention", "ffn", "stem", "depth"]},
    **{f"criterion {name}": {"saliency": name} for name in CRITERIA if name != DEFAULT},
}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def proportional(space: Space, share: float) -> dict[str, int]:
    """Widths in the source's proportions, heads rounded, as large as the share allows."""
    source, best = space.widths, {}
    for hidden in range(space.head_dim, source.hidden):
        scale = hidden / source.hidden
        heads = max(1, round(scale * source.heads))
        widths = Widths(source.layers, hidden, heads, heads, max(1, round(scale * source.intermediate)))
        if space.num_params(widths) <= share * space.num_params():
            best = {"hidden": hidden, "heads": heads, "intermediate": widths.intermediate}
    return best


def recipe_of(folder: Path, arm: str, seed: int, tokens: int, loop: dict[str, Any] | None) -> dict[str, Any]:
    """loop: summary of the default loop of this seed, where the arm needs its shape."""
    source, scratch = folder / "source" / "model", arm.startswith("from scratch")
    if scratch:
        assert loop is not None
        recipe = stage_recipe(folder, f"{seed}/{arm}", Path(loop["result"]["path"]), tokens, SIZE) | {"init": "random"}
    else:
        recipe = stage_recipe(folder, f"{seed}/{arm}", source, tokens, SIZE)
        prune = {"target": "40%"} | ARMS[arm]
        if prune["target"] == SHAPE["target"]:
            assert loop is not None
            widths = loop["result"]["widths"]
            prune["target"] = {name: widths[name] for name in ("hidden", "heads", "intermediate")}
        elif prune["target"] == PROPORTIONAL["target"]:
            prune["target"] = proportional(space_of(load_config(str(source))), 0.4)
        recipe["prune"] = prune
    if "distilled" in arm:
        recipe["distill"] = {"teacher": str(source), "hidden": float("hidden states" in arm)}
    recipe["train"] |= {"seed": seed, "lr": 4e-3 if scratch else 2e-3}
    recipe["run"] |= {"validate_every": "100%", "checkpoint_every": "100%"}
    return recipe


def row(arm: str, losses: list[float], base: list[float], widths: list[str]) -> str:
    spread = "-"
    if len(losses) > 1 and arm != "loop":
        found = over_seeds(losses, base)
        spread = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    return f"| {arm} | {', '.join(f'{loss:.3f}' for loss in losses)} | {spread} | {', '.join(widths)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source-tokens", default="2M")
    parser.add_argument("--tokens", default="400K")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    folder, tokens = arguments.folder, parse_count(arguments.tokens)
    start = write_architecture(folder, prepare_corpus(folder, SIZE, say), SIZE)
    recipe = stage_recipe(folder, "source", start, parse_count(arguments.source_tokens), SIZE) | {"init": "random"}
    source = run(Recipe.model_validate(recipe), say)
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in dict.fromkeys(["loop", *arguments.arms]):
        for seed in range(1, arguments.seeds + 1):
            loop = results["loop"][seed - 1] if arm != "loop" else None
            try:
                summary = run(Recipe.model_validate(recipe_of(folder, arm, seed, tokens, loop)), say)
            except UsageError as error:  # an arm may diverge; the others go on
                say(f"{arm}, seed {seed}: {error}")
                break
            results.setdefault(arm, []).append(summary)
        if len(results.get("loop", ())) < arguments.seeds:
            raise SystemExit("the default loop failed, and without it there is nothing to compare with")
        done = [summary["result"]["validation_loss"] for summary in results.get(arm, [])]
        print(json.dumps({"arm": arm, "losses": done}), flush=True)
    base = [summary["result"]["validation_loss"] for summary in results["loop"]]
    lines = [
        f"source: {source['result']['validation_loss']:.3f}",
        "",
        "| arm | validation loss by seed | against the loop (95 %) | FFN/heads/hidden |",
        "| --- | --- | --- | --- |",
    ]
    for arm, summaries in results.items():
        if len(summaries) == arguments.seeds:
            shapes = [summary["result"]["widths"] for summary in summaries]
            widths = [f"{shape['intermediate']}/{shape['heads']}/{shape['hidden']}" for shape in shapes]
            lines.append(row(arm, [each["result"]["validation_loss"] for each in summaries], base, widths))
    print("\n".join(lines))
    if arguments.table:
        arguments.table.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
