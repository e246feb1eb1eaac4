"""Does pruning by a cost buy more of that cost than pruning by another one, at equal validation loss?

    python benchmarks/costs.py FOLDER --books DIR [--seeds 3] [--tokens 100K] [--source-tokens 3M]

A 0.56 M parameter Llama (3 layers, hidden 96, 6 heads of 16, FFN 288, vocabulary 2,048, tied) is trained on books in
rows of 1,024 tokens. Of all sizes that one thread trains within minutes, this context lets the four costs part: a
head's parameter then stands for six times as many FLOPs as an FFN channel's (attention grows with the context,
the weights do not), and for all of the KV cache. It is fixed beforehand: no other context was tried.

The source is pruned by each cost to four shares of it, once a seed (a seed is an order of batches; the source is one),
with taylor-element, default bound and correction, widths of any number (`align: 1`) and floors out of the
way. A table of latencies is measured first, and all results once more at the end. benchmarks/costs_report.py says how
the arms are compared. Prints Markdown. Finished runs under FOLDER are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from costs_report import MEASURED, Row, comparison_table, results_table

from comparison import write_text
from efficientllm.benching.settings import Settings
from efficientllm.benching.table import grid_of, held_out_shapes, latencies, measure_table
from efficientllm.config import Recipe
from efficientllm.demo.story import DemoSize, stage_recipe, write_architecture
from efficientllm.jobs.prune import run
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.latency_table import load_table
from efficientllm.models.loading import load_config
from efficientllm.models.space import space_of, widths_of
from efficientllm.pruning.costs import Cost, KVCache, Params
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.bench_table import table_page
from efficientllm.sizes import parse_count

SIZE = DemoSize(hidden=96, layers=3, heads=6, intermediate=288, sequence_length=1024, validation_tokens=32_768)
SETTINGS = Settings(1008, 16, (1,), 3, "transformers", "cpu", "float32", 1)
LEAST_FFN = 8
LR = 2e-3
SHARES = {  # chosen so that the losses overlap; the table's cost last, since it is the one that a device decides
    "params": ("80%", "60%", "45%", "30%"),
    "flops": ("80%", "60%", "45%", "30%"),
    "kv-cache": ("67%", "50%", "34%", "17%"),
    "latency": ("80%", "65%", "50%", "40%"),
}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def stage(folder: Path, name: str, source: Path, tokens: int, **more: Any) -> Row:
    """One run; `more` holds further sections of its recipe, with changes to `train` among them."""
    recipe = stage_recipe(folder, name, source, tokens, SIZE)
    recipe["train"] |= more.pop("train", {})
    recipe["run"] |= {"validate_every": "100%", "checkpoint_every": "100%", "report": False, "trackers": []}
    return run(Recipe.model_validate(recipe | more), say)


def prune_section(cost: str, share: str, table: Path) -> Row:
    size: Any = share if cost == "params" else {cost.replace("-", "_"): share}
    section: Row = {"target": size, "cost": cost, "saliency": "taylor-element", "end": "50%", "align": 1}
    section["floors"] = {"intermediate": LEAST_FFN}
    return section | ({"latency_table": str(table)} if cost == "latency" else {})


def table_of(folder: Path, model: Path) -> Path:
    """The file of the table, measured once."""
    file = folder / "table.json"
    if not file.is_file():
        say("measuring a table of latencies")
        config = load_config(str(model))
        grid = grid_of(config, least_ffn=LEAST_FFN)
        content = measure_table(config, SETTINGS, grid, held_out_shapes(config, grid, 12))
        file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _name(what: tuple[str, str, int]) -> str:
    return "runs/{}-{}-{}".format(*what)


def run_all(folder: Path, model: Path, table: Path, tokens: int, seeds: int) -> list[Row]:
    """Every arm at every size with every seed; says after each how long the rest will take."""
    rows: list[Row] = []
    todo = [(cost, share, seed) for cost, shares in SHARES.items() for seed in range(1, seeds + 1) for share in shares]
    open_ones = [name for name in map(_name, todo) if not (folder / name / "summary.json").is_file()]
    spent, fresh = 0.0, 0
    for index, (cost, share, seed) in enumerate(todo, 1):
        begun, name = time.monotonic(), _name((cost, share, seed))
        changes = {"seed": seed, "lr": LR}
        done = stage(folder, name, model, tokens, prune=prune_section(cost, share, table), train=changes)["result"]
        rows.append({"cost": cost, "share": share, "seed": seed, "loss": done["validation_loss"]})
        rows[-1]["widths"] = Widths(**done["widths"])
        if name in open_ones:
            spent, fresh = spent + time.monotonic() - begun, fresh + 1
        left = spent / max(1, fresh) * (len(open_ones) - fresh) / 60
        say(f"{index} of {len(todo)}: {name}, loss {done['validation_loss']:.3f}, about {left:.0f} minutes left")
    return rows


def price(folder: Path, rows: Sequence[Row], costs: Mapping[str, Cost], model: Path) -> None:
    """Adds to each row what its shape costs, as a share of the source's; each shape is measured once."""
    config, file = load_config(str(model)), folder / "measured.json"
    shapes = list(dict.fromkeys([widths_of(config), *(row["widths"] for row in rows)]))
    known = json.loads(file.read_text()) if file.is_file() else {}
    if any(str(shape) not in known for shape in shapes):
        say(f"measuring {len(shapes)} shapes")
        seconds, _ = latencies(config, shapes, SETTINGS)
        known = dict(zip(map(str, shapes), seconds, strict=True))
        file.write_text(json.dumps(known, indent=1) + "\n")
    for row in rows:
        shares = {name: cost(row["widths"]) / cost(shapes[0]) for name, cost in costs.items()}
        row["shares"] = shares | {MEASURED: known[str(row["widths"])] / known[str(shapes[0])]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--source-tokens", default="3M")
    parser.add_argument("--tokens", default="100K")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder
    start = write_architecture(folder, write_text(folder, arguments.books), SIZE)
    source = stage(folder, "source", start, parse_count(arguments.source_tokens), init="random")
    model = folder / "source" / "model"
    table = table_of(folder, model)
    rows = run_all(folder, model, table, parse_count(arguments.tokens), arguments.seeds)
    space = space_of(load_config(str(model)))
    costs: dict[str, Cost] = {"params": Params(space), "flops": FlopsPerToken(space, SIZE.sequence_length)}
    costs |= {"kv-cache": KVCache(space.head_dim), "latency": load_table(str(table)).cost()}
    price(folder, rows, costs, model)
    print(f"The source's validation loss is {source['result']['validation_loss']:.3f}.", end="\n\n")
    print(results_table(rows), comparison_table(rows), sep="\n\n", end="\n\n")
    print(table_page(json.loads(table.read_text()), table.name))


if __name__ == "__main__":
    main()
