"""What is asked of a measurement: every mistake in one sentence, nothing replaced in silence."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import torch

from efficientllm.errors import UsageError
from efficientllm.models.latency_table import DTYPES


@dataclass(frozen=True)
class Settings:
    """One measurement, the same for every model.

    prompt, generate: tokens of a sequence, in and out; the first generated one comes from prefill, the others from
    generate - 1 decode steps. batches: sequences at once, one after another. repeats: counted runs of each batch.
    dtype: of weights and activations (transformers), or the GGUF type that folders are written in (llama.cpp).
    """

    prompt: int
    generate: int
    batches: tuple[int, ...]
    repeats: int
    backend: str
    device: str
    dtype: str
    threads: int

    @property
    def context(self) -> int:
        """Positions of a whole sequence."""
        return self.prompt + self.generate


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
    return tuple(dict.fromkeys(map(int, parts)))


def torch_device(wanted: str) -> str:
    """`cpu` or `cuda:N`; auto takes the GPU where there is one. Raises UsageError for what is not there."""
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    device = {"auto": "cuda:0" if len(here) > 1 else "cpu", "cuda": "cuda:0"}.get(wanted, wanted)
    if device not in here:
        raise UsageError(f"--device {wanted} cannot be measured here; choose auto, {', '.join(here)}")
    return device


def torch_dtype(wanted: str, device: str) -> str:
    """auto: float32 on a CPU, bfloat16 (float16 where there is none) on a GPU; the same for all models."""
    if wanted == "auto" and device.startswith("cuda"):
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if wanted not in ("auto", *DTYPES):
        raise UsageError(f"--dtype {wanted} is not known; choose auto, {', '.join(DTYPES)}")
    return "float32" if wanted == "auto" else wanted


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
    """The GGUF type that folders are exported to, f16 where it is left open. A .gguf file keeps its own."""
    from efficientllm.export.gguf_tensors import K_QUANTS, WRITTEN

    if wanted == "auto":
        return "f16"
    if any(model.endswith(".gguf") for model in models):
        raise UsageError(f"--dtype {wanted} cannot change a .gguf file; leave it out (folders become f16 files)")
    if wanted in K_QUANTS:
        raise UsageError(f"--dtype {wanted} is written by llama-quantize alone; name the .gguf file that it made")
    if wanted not in WRITTEN:
        raise UsageError(f"--dtype {wanted} is no GGUF type; choose auto, {', '.join(WRITTEN)}")
    return wanted
