"""Commands about scores: probe, criteria."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficientllm.cli.app import app, one_sentence, say


@app.command()
@one_sentence()
def probe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A transformers folder, .gguf file or hub id.")],
    data: Annotated[
        list[str], typer.Option("--data", help="Text: parquet, jsonl, txt, folder or hub id; may be given twice.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for probe.json and probe.png.")] = Path("probe"),
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    units: Annotated[int, typer.Option(min=2, help="Units sampled of each type.")] = 24,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to measure on; default: as many as 10 minutes allow.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 256,
    micro_batch: Annotated[int, typer.Option(min=1, help="Rows of a pass; fewer where memory is short.")] = 4,
    depth: Annotated[bool, typer.Option("--depth", help="Whole layers too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
) -> None:
    """Measure how well every criterion predicts what removing a unit of this model really costs."""
    from efficientllm.jobs.probing import ProbeRequest, run_probe
    from efficientllm.pruning.dimensions import DEFAULT_TYPES, EXPERT_TYPES, PRUNING_TYPES
    from efficientllm.reporting.tables import print_rows

    result = run_probe(
        ProbeRequest(
            model,
            data,
            out,
            text_column,
            (*(PRUNING_TYPES if depth else DEFAULT_TYPES), *EXPERT_TYPES),  # those that the model has
            units,
            tokens,
            sequence_length,
            micro_batch,
            seed,
            device,
        ),
        say,
    )
    groups = list(next(iter(result["criteria"].values())))
    rows = [["prune.saliency", *groups]]
    for name, found in result["criteria"].items():
        rows.append([name, *(f"{found[each]['rank_correlation']:.2f} ({found[each]['scale']:.3g})" for each in groups)])
    title = "rank correlation with the true loss increase, and (scale: score / truth)"
    print_rows(rows, title, figures=True)
    say(f"{out / 'probe.json'}, {out / 'probe.png'}")


@app.command()
def criteria() -> None:
    """List the saliency criteria: what each looks at, what it costs, and the paper it is from."""
    from efficientllm.pruning.criteria import CRITERIA
    from efficientllm.reporting.tables import console, print_rows

    rows = [["prune.saliency", "score of a unit", "looks at", "cost", "paper"]]
    for each in CRITERIA.values():
        looks = "nothing" if each.needs == "nothing" else " and ".join({"weights": None, each.needs: None})
        rows.append([each.name, each.about, looks, each.cost, each.source])
    print_rows(rows)
    console().print(
        "In the loop on a model of 1 M parameters flap and sparsegpt ended no better than random (three seeds, "
        "docs/results/ablations.md); efficientllm probe measures them all on yours."
    )
