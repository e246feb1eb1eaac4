"""Does each cost give an architecture of its own, and does each win its own measure at equal validation loss?

    python benchmarks/costs.py FOLDER [--source-tokens 500K] [--tokens 60K]

A 1.1 M parameter Llama (4 layers, hidden 128, 8 heads of 16, FFN 384, vocabulary 2,048, tied) is trained on Python's
standard library; a table of latencies is measured (prompts of 240 tokens, 8 generated, one thread); then the source is
pruned by each cost to three shares of it, on the same batches (without correction and with at most 2 % of the
parameters between two looks at the gradient: a short run). Every result is priced by all four costs as a share of the
source's, and its latency is measured besides. What a cost would pay for a common validation loss is interpolated
between its three results. Prints Markdown. Finished runs under FOLDER are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from efficientllm.benching.contract import Settings
from efficientllm.benching.table import TableRequest, latencies, measure_table
from efficientllm.config import Recipe
from efficientllm.demo.story import DemoSize, prepare_corpus, stage_recipe, write_architecture
from efficientllm.jobs.prune import run
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.latency_table import load_table
from efficientllm.models.loading import load_config
from efficientllm.models.space import space_of, widths_of
from efficientllm.pruning.costs import Cost, KVCache, Params
from efficientllm.pruning.groups import Widths
from efficientllm.reporting.bench_table import table_page
from efficientllm.reporting.eval_table import markdown
from efficientllm.sizes import parse_count

SIZE = DemoSize(heads=8, sequence_length=256, validation_tokens=32_768)
SHARES = {
    "params": ("70%", "55%", "40%"),
    "flops": ("70%", "55%", "40%"),
    "kv-cache": ("50%", "25%", "12.5%"),
    "latency": ("80%", "65%", "55%"),
}
MEASURED = "latency, measured"
Row = dict[str, Any]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def stage(folder: Path, name: str, source: Path, tokens: int, lr: float, **more: Any) -> Row:
    recipe = stage_recipe(folder, name, source, tokens, SIZE)
    recipe["train"] |= {"lr": lr}
    recipe["run"] |= {"validate_every": "100%", "checkpoint_every": "50%", "report": False, "trackers": []}
    return run(Recipe.model_validate(recipe | more), say)


def prune_section(cost: str, share: str, table: Path) -> Row:
    size: Any = share if cost == "params" else {cost.replace("-", "_"): share}
    section: Row = {"target": size, "cost": cost, "end": "50%", "correction": "none", "bound": "2%"}
    return section | ({"latency_table": str(table)} if cost == "latency" else {})


def table_of(folder: Path, model: Path, settings: Settings) -> Path:
    """The file of the table, measured once; its page goes to stdout every time."""
    file = folder / "table.json"
    if not file.is_file():
        say("measuring a table of latencies")
        content = measure_table(load_config(str(model)), settings, TableRequest(held_out=12), lambda: None)
        file.write_text(json.dumps(content, indent=1) + "\n")
    print(table_page(json.loads(file.read_text()), file.name), end="\n\n")
    return file


def price(rows: Sequence[Row], costs: Mapping[str, Cost], model: Path, settings: Settings) -> None:
    """Adds to each row what its shape costs, as a share of the source's."""
    config = load_config(str(model))
    seconds, _ = latencies(config, [*(row["widths"] for row in rows), widths_of(config)], settings)
    for row, latency in zip(rows, seconds, strict=False):
        shares = {name: cost(row["widths"]) / cost(widths_of(config)) for name, cost in costs.items()}
        row["shares"] = shares | {MEASURED: latency / seconds[-1]}


def at_loss(rows: Sequence[Row], loss: float, measure: str) -> float:
    """The share of a measure that a cost's runs pay for a loss: between those around it, linearly."""
    points = sorted((row["loss"], row["shares"][measure]) for row in rows)
    for (low, more), (high, less) in pairwise(points):
        if low <= loss <= high:
            return float(more + (less - more) * (loss - low) / (high - low)) if high > low else float(less)
    return float("nan")


def results_table(rows: Sequence[Row]) -> str:
    measures = list(rows[0]["shares"])
    table = [["pruned by", "to", "validation loss", "hidden", "heads", "FFN", *measures]]
    for row in rows:
        widths = row["widths"]
        shape = [str(width) for width in (widths.hidden, widths.heads, widths.intermediate)]
        table.append(
            [
                row["cost"],
                row["share"],
                f"{row['loss']:.3f}",
                *shape,
                *(f"{row['shares'][each]:.1%}" for each in measures),
            ]
        )
    return markdown(table)


def equal_loss_table(rows: Sequence[Row]) -> str:
    """Rows: the measure; columns: the cost pruned by; the lowest share of a row is bold."""
    by_cost = {name: [row for row in rows if row["cost"] == name] for name in SHARES}
    low = max(min(row["loss"] for row in each) for each in by_cost.values())
    high = min(max(row["loss"] for row in each) for each in by_cost.values())
    if low > high:
        return f"No validation loss is common to all costs ({low:.3f} is above {high:.3f})."
    parts = []
    for loss in (low, (low + high) / 2, high):
        table = [[f"measure at loss {loss:.3f}", *(f"by {name}" for name in by_cost)]]
        for measure in rows[0]["shares"]:
            shares = [at_loss(each, loss, measure) for each in by_cost.values()]
            table.append([measure, *(f"**{x:.1%}**" if x == min(shares) else f"{x:.1%}" for x in shares)])
        parts.append(markdown(table))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source-tokens", default="500K")
    parser.add_argument("--tokens", default="60K")
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    folder = arguments.folder
    start = write_architecture(folder, prepare_corpus(folder, SIZE, say), SIZE)
    tokens = parse_count(arguments.source_tokens)
    source = stage(folder, "source", start, tokens, SIZE.lr, init="random")
    model = folder / "source" / "model"
    settings = Settings(240, 8, (1,), 3, "transformers", "cpu", "float32", 1)
    table = table_of(folder, model, settings)
    rows = []
    for cost, shares in SHARES.items():
        for share in shares:
            section = prune_section(cost, share, table)
            done = stage(folder, f"{cost}-{share}", model, parse_count(arguments.tokens), arguments.lr, prune=section)
            result = done["result"]
            rows.append(
                {"cost": cost, "share": share, "loss": result["validation_loss"], "widths": Widths(**result["widths"])}
            )
    space = space_of(load_config(str(model)))
    costs: dict[str, Cost] = {"params": Params(space), "flops": FlopsPerToken(space, SIZE.sequence_length)}
    costs |= {"kv-cache": KVCache(space.head_dim), "latency": load_table(str(table)).cost()}
    price(rows, costs, model, settings)
    print(f"The source's validation loss is {source['result']['validation_loss']:.3f}.", end="\n\n")
    print(results_table(rows), equal_loss_table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
