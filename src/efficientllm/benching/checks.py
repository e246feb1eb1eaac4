"""Settings from what the user wrote: every mistake in one sentence, nothing replaced in silence."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch

from efficientllm.benching.contract import Settings
from efficientllm.errors import UsageError
from efficientllm.models.latency_table import DTYPES


def resolved(asked: Settings, models: list[str]) -> Settings:
    """Device and dtype as they will be. Raises UsageError for what is not here."""
    if asked.backend == "transformers":
        device = torch_device(asked.device)
        return replace(asked, device=device, dtype=torch_dtype(asked.dtype, device))
    if asked.backend != "llamacpp":
        raise UsageError(f"--backend {asked.backend} is not known; choose transformers or llamacpp")
    for name in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(name) is None:
            mend = 'pip install "efficientllm[llamacpp]"'
            raise UsageError(f"--backend llamacpp needs {name}, which is not installed: {mend}")
    return replace(asked, device=llamacpp_device(asked.device), dtype=llamacpp_dtype(asked.dtype, models))


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes from "1,4", each once. Raises UsageError for what is no positive number."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text} is not a list of positive numbers such as 1,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


def torch_device(wanted: str) -> str:
    """`cpu` or `cuda:N`; auto takes the GPU where there is one. Raises UsageError for what is not there."""
    count = torch.cuda.device_count()
    kind, _, index = ("cuda" if count else "cpu", "", "") if wanted == "auto" else wanted.partition(":")
    if (kind, index) == ("cpu", ""):
        return kind
    if kind == "cuda" and f"0{index}".isdecimal() and int(f"0{index}") < count:
        return f"cuda:{int(f'0{index}')}"
    raise UsageError(f"--device {wanted} cannot be measured here; choose auto, cpu or one of {count} CUDA devices")


def torch_dtype(wanted: str, device: str) -> str:
    """auto: float32 on a CPU, bfloat16 (float16 where there is none) on a GPU; the same for all models."""
    cuda = device.startswith("cuda")
    bf16 = not cuda or torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "auto":
        return ("bfloat16" if bf16 else "float16") if cuda else "float32"
    if wanted not in DTYPES:
        raise UsageError(f"--dtype {wanted} is not known; choose auto, {', '.join(DTYPES)}")
    if wanted == "bfloat16" and not bf16:
        raise UsageError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} has none; choose float16 or float32")
    return wanted


def llamacpp_device(wanted: str) -> str:
    """`cpu` or `gpu`. Raises UsageError where this build of llama.cpp knows no accelerator."""
    import llama_cpp

    if wanted not in ("auto", "cpu", "gpu"):
        raise UsageError(f"--device {wanted} is not llama.cpp's; choose auto, cpu or gpu (all layers)")
    offloads = bool(llama_cpp.llama_supports_gpu_offload())
    if wanted == "gpu" and not offloads:
        raise UsageError("--device gpu: this build of llama.cpp computes on the CPU alone")
    return "gpu" if offloads and wanted != "cpu" else "cpu"


def llamacpp_dtype(wanted: str, models: list[str]) -> str:
    """The GGUF type that folders are exported to, f16 where it is left open. A .gguf file keeps its own: in words."""
    from efficientllm.export.gguf_tensors import K_QUANTS, WRITTEN

    files = [model for model in models if model.endswith(".gguf")]
    if wanted == "auto":
        folders = f"f16{' (.gguf files: as in the file)' if files else ''}"
        return folders if len(files) < len(models) else "as in the file"
    if files:
        raise UsageError(f"--dtype {wanted} cannot change a .gguf file; leave it out (folders become f16 files)")
    if wanted in K_QUANTS:
        raise UsageError(f"--dtype {wanted} is written by llama-quantize alone; name the .gguf file that it made")
    if wanted not in WRITTEN:
        raise UsageError(f"--dtype {wanted} is no GGUF type; choose auto, {', '.join(WRITTEN)}")
    return wanted


def check_table(models: list[str], settings: Settings, file: Path, out: Path | None) -> None:
    """Raises UsageError for what a table of latencies cannot be measured with."""
    if len(models) != 1 or len(settings.batches) != 1:
        raise UsageError("--table is of one model's widths and of one --batch: name one of each")
    if settings.backend != "transformers":
        raise UsageError(f"--table measures in transformers; leave out --backend {settings.backend}")
    if out is not None:
        raise UsageError("--json goes with a comparison of models; --table FILE is itself JSON: leave one out")
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"--table {file} cannot be written; name a file in a folder that is there")
