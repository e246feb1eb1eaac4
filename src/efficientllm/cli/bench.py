"""The command that measures models where they are to run: bench."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efficientllm.cli.app import app, one_sentence, say
from efficientllm.errors import UsageError

if TYPE_CHECKING:
    from efficientllm.benching.contract import Settings

STOPPED = "stopped; nothing of this measurement is kept"


@app.command()
@one_sentence()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Run folders, transformers folders, hub ids, .gguf files."),
    ],
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    generate: Annotated[int, typer.Option(help="Tokens to generate; the first one ends the prefill.")] = 64,
    batch: Annotated[
        str | None, typer.Option(help="Sequences at once, comma-separated, each measured; default: 1,4 (--table: 1).")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Counted runs of each batch, after one that is not.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1; llamacpp: auto, cpu, gpu.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: float32 on a CPU. llamacpp: a GGUF type; auto: f16.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="transformers or llamacpp.")] = "transformers",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="File for every sample, in seconds and joules.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="File for latencies over a grid of widths below MODEL's: prune.latency_table.")
    ] = None,
    levels: Annotated[int | None, typer.Option(help="With --table: widths measured of each axis; default: 3.")] = None,
    held_out: Annotated[
        int | None, typer.Option(help="With --table: further shapes that tell how far it is off; default: 8.")
    ] = None,
    depth: Annotated[bool, typer.Option(help="With --table: fewer layers too, for prune.types depth.")] = False,
) -> None:
    """Latency, tokens/s, memory, FLOPs and energy of models side by side, measured in turn; ratios to the first.

    Runs among the models keep the latest result of each backend, and their next report shows it.
    """
    import torch

    from efficientllm.benching.checks import check_numbers, parse_batches
    from efficientllm.benching.contract import Settings
    from efficientllm.benching.results import result_of
    from efficientllm.benching.runner import measure_all, runs
    from efficientllm.benching.subjects import candidates
    from efficientllm.jobs.interruption import stopping
    from efficientllm.reporting.bench_table import bench_page
    from efficientllm.reporting.progress import track

    count = torch.get_num_threads() if threads is None else threads
    batches = parse_batches(batch or ("1" if table else "1,4"))
    asked = Settings(prompt, generate, batches, repeats, backend, device, dtype, count)
    check_numbers(asked)
    settings = _resolved(asked, models)
    if table is not None:
        _measure_table(models, settings, table, out, (_or(levels, 3), _or(held_out, 8), depth))
        return
    if depth or levels is not None or held_out is not None:
        raise UsageError("--levels, --held-out and --depth are of a table of latencies: add --table FILE")
    if out is not None and out.is_dir():
        raise UsageError(f"--json {out} is a folder; name a file")
    with stopping(STOPPED), tempfile.TemporaryDirectory(prefix="efficientllm-") as temporary:
        subjects = candidates(models, settings, Path(temporary), say)
        with track("bench", runs(len(subjects), settings)) as bar:
            result = result_of(subjects, settings, measure_all(subjects, settings, bar.advance))
    print(bench_page(result))
    _keep(result, models, settings.backend, out)


def _keep(result: dict[str, Any], models: list[str], backend: str, out: Path | None) -> None:
    """In the file that was asked for, and in the folders of the runs among the models."""
    from efficientllm.benching.subjects import homes
    from efficientllm.reporting.journal import without_nonfinite, write_atomically

    content = (json.dumps(without_nonfinite(result), indent=1) + "\n").encode()
    for file in [*([out] if out else []), *(home / "bench" / f"{backend}.json" for home in homes(models))]:
        write_atomically(file, content)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _measure_table(
    models: list[str], settings: Settings, file: Path, out: Path | None, asked: tuple[int, int, bool]
) -> None:
    """bench --table: measures, writes the file and prints how far the table is off."""
    from efficientllm.benching.checks import check_table
    from efficientllm.benching.subjects import config_of
    from efficientllm.benching.table import TableRequest, measure_table, runs_of
    from efficientllm.jobs.interruption import stopping
    from efficientllm.models.latency_table import off_by
    from efficientllm.reporting.bench_table import table_page
    from efficientllm.reporting.journal import write_atomically
    from efficientllm.reporting.progress import track

    request = TableRequest(*asked)
    check_table(models, settings, request.levels, request.held_out, file, out)
    config = config_of(models[0], settings)
    with stopping(STOPPED), track("bench", runs_of(config, settings, request)) as bar:
        content = measure_table(config, settings, request, bar.advance)
    write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
    print(table_page(content, str(file)))
    if doubt := off_by(content["median_error"]):
        say(f"the table's median error is {content['median_error']:.1%}{doubt}")


def _resolved(asked: Settings, models: list[str]) -> Settings:
    """Device and dtype as they will be. Raises UsageError for what is not here."""
    from dataclasses import replace

    from efficientllm.benching import checks
    from efficientllm.benching.subjects import check_extra

    checks.check_backend(asked.backend)
    check_extra(asked.backend)
    if asked.backend == "llamacpp":
        device, dtype = checks.llamacpp_device(asked.device), checks.llamacpp_dtype(asked.dtype, models)
    else:
        device = checks.torch_device(asked.device)
        dtype = checks.torch_dtype(asked.dtype, device)
    return replace(asked, device=device, dtype=dtype)
