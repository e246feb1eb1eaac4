"""The command that measures models where they are to run: bench."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficientllm.cli.app import app, one_sentence, say
from efficientllm.errors import UsageError

if TYPE_CHECKING:
    from efficientllm.benching.settings import Settings

STOPPED = "stopped; nothing of this measurement is kept"


@app.command()
@one_sentence()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Run folders, transformers folders, hub ids, .gguf files."),
    ],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate; the first one ends the prefill.")] = 64,
    batch: Annotated[
        str | None, typer.Option(help="Sequences at once, comma-separated, each measured; default: 1,4 (--table: 1).")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each batch, after one that is not.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1; llamacpp: auto, cpu, gpu.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: float32 on a CPU. llamacpp: a GGUF type; auto: f16.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="transformers or llamacpp.")] = "transformers",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's choice.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="File for every sample, in seconds.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="File for latencies over a grid of widths below MODEL's: prune.latency_table.")
    ] = None,
    levels: Annotated[
        int | None, typer.Option(min=2, help="With --table: widths measured of each axis; default: 3.")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="With --table: further shapes that tell how far it is off; default: 8.")
    ] = None,
    depth: Annotated[bool, typer.Option(help="With --table: fewer layers too, for prune.types depth.")] = False,
) -> None:
    """Latency, tokens/s, memory and FLOPs of models side by side, measured in turn; ratios to the first.

    Runs among the models keep the latest result of each backend, and their next report shows it.
    """
    import torch

    from efficientllm.benching.settings import Settings, parse_batches, resolved
    from efficientllm.jobs.interruption import stopping

    count = torch.get_num_threads() if threads is None else threads
    batches = parse_batches(batch or ("1" if table else "1,4"))
    settings = resolved(Settings(prompt, generate, batches, repeats, backend, device, dtype, count), models)
    _check(models, settings, table, out, of_table=depth or levels is not None or held_out is not None)
    with stopping(STOPPED):
        if table is None:
            _measure(models, settings, out)
        else:
            _measure_table(models[0], settings, table, levels or 3, held_out or 8, depth)


def _check(models: list[str], settings: Settings, table: Path | None, out: Path | None, *, of_table: bool) -> None:
    """Raises UsageError for options that do not go together. of_table: whether there are any that go with a table."""
    if table is None and of_table:
        raise UsageError("--levels, --held-out and --depth are of a table of latencies: add --table FILE")
    if out is not None and out.is_dir():
        raise UsageError(f"--json {out} is a folder; name a file")
    if table is None:
        return
    if len(models) != 1 or len(settings.batches) != 1:
        raise UsageError("--table is of one model's widths and of one --batch: name one of each")
    if settings.backend != "transformers":
        raise UsageError(f"--table measures in transformers; leave out --backend {settings.backend}")
    if out is not None:
        raise UsageError("--json goes with a comparison of models; --table FILE is itself JSON: leave one out")
    if table.is_dir() or not table.parent.is_dir():
        raise UsageError(f"--table {table} cannot be written; name a file in a folder that is there")


def _measure(models: list[str], settings: Settings, out: Path | None) -> None:
    """Measures, prints the page, and writes it into the file asked for and the folders of the runs among the models."""
    from efficientllm.benching.process import measure_all
    from efficientllm.benching.results import result_of
    from efficientllm.benching.subjects import homes, subjects
    from efficientllm.files import write_json
    from efficientllm.reporting.bench_table import bench_page
    from efficientllm.reporting.journal import without_nonfinite

    with tempfile.TemporaryDirectory(prefix="efficientllm-") as temporary:
        asked = subjects(models, settings, Path(temporary), say)
        result = result_of(asked, settings, measure_all(asked, settings))
    print(bench_page(result))
    kept = [home / "bench" / f"{settings.backend}.json" for home in homes(models)]
    for file in [*([out] if out else []), *kept]:
        write_json(file, without_nonfinite(result))


def _measure_table(model: str, settings: Settings, file: Path, levels: int, held_out: int, depth: bool) -> None:
    """bench --table: measures, writes the file and prints how far the table is off."""
    from efficientllm.benching.subjects import config_of
    from efficientllm.benching.table import grid_of, held_out_shapes, measure_table
    from efficientllm.files import write_json
    from efficientllm.models.latency_table import off_by
    from efficientllm.reporting.bench_table import table_page

    config = config_of(model, settings)
    grid = grid_of(config, levels, depth=depth)
    content = measure_table(config, settings, grid, held_out_shapes(config, grid, held_out))
    write_json(file, content)
    print(table_page(content, str(file)))
    if doubt := off_by(content["median_error"]):
        say(f"the table's median error is {content['median_error']:.1%}{doubt}")
