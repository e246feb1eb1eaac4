"""The command that takes models elsewhere: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from efficientllm.cli.app import app, one_sentence, say
from efficientllm.errors import UsageError

STOPPED = "stopped; nothing half-written is left"


@app.command()
@one_sentence()
def export(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL", help="A run folder, RUN/ladder/SIZE, transformers folder or .gguf file."),
    ],
    to: Annotated[str, typer.Option("--to", help="hf: a transformers folder; gguf: one file for llama.cpp.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder (hf) or file (gguf); default: RUN/hf, RUN/gguf.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    licence: Annotated[str | None, typer.Option("--license", help="The hub's identifier, such as apache-2.0.")] = None,
    kind: Annotated[
        str, typer.Option("--type", help="gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; q4_k_m and the like.")
    ] = "f16",
    dtype: Annotated[str, typer.Option("--dtype", help="hf: float32, bfloat16 or float16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="hf: size of one file.")] = "5GB",
    check: Annotated[
        bool, typer.Option("--check", help="Compare tokens and probabilities, in each runtime that is here.")
    ] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="ORG/NAME", help="hf: upload to the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="hf: where --push makes the repository.")] = False,
) -> None:
    """Write a run's model, a size of its ladder or any supported model as a transformers folder or a GGUF file."""
    foreign = {"hf": ("kind",), "gguf": ("dtype", "max_shard_size", "push", "private")}
    if to not in foreign:
        raise UsageError(f"--to {to} is no format; choose hf or gguf")
    for name in foreign[to]:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--type" if name == "kind" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has no effect with --to {to}; leave it out")
    if to == "gguf":
        _to_gguf(model, kind.lower(), out, overwrite, licence, check)
        return
    from efficientllm.export.check import check_hf
    from efficientllm.export.hf import export_hf
    from efficientllm.export.push import check_push, push_folder
    from efficientllm.export.subject import subject_of
    from efficientllm.jobs.interruption import stopping

    if private and not push:
        raise UsageError("--private has no effect without --push ORG/NAME")
    if push:
        check_push(push)
    subject = subject_of(model)
    with stopping(STOPPED):
        folder = export_hf(subject, dtype, max_shard_size, out, overwrite=overwrite, licence=licence, say=say)
    print(folder)
    with stopping(f"stopped; the folder {folder} is whole, but not {'pushed' if push else 'checked'}"):
        if check:
            check_hf(subject.folder, folder, dtype, say)
        if push:
            print(push_folder(folder, push, private=private, say=say))


def _to_gguf(model: Path, kind: str, out: Path | None, overwrite: bool, licence: str | None, check: bool) -> None:
    try:
        from efficientllm.export.gguf import export_gguf
    except ImportError as error:
        if (error.name or "").split(".")[0] != "gguf":
            raise
        raise UsageError('--to gguf needs the gguf package: pip install "efficientllm[gguf]"') from error
    from efficientllm.export.check import check_gguf
    from efficientllm.export.gguf_tensors import K_QUANTS
    from efficientllm.export.subject import subject_of
    from efficientllm.jobs.interruption import stopping

    subject = subject_of(model)
    with stopping(STOPPED):
        file = export_gguf(subject, kind, out, overwrite=overwrite, licence=licence, say=say)
    print(file)
    with stopping(f"stopped; the file {file} is whole, but not checked"):
        if check:
            check_gguf(subject.folder, file, "f16" if kind in K_QUANTS else kind, say)
