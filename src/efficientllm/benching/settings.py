"""What is asked of a measurement: every mistake in one sentence, nothing replaced in silence."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
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
    _chosen("--backend", asked.backend, dict.fromkeys(("transformers", "llamacpp"), ""))
    if asked.backend == "llamacpp":
        return _for_llamacpp(asked, models)
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    best = gpus[0] if gpus else "cpu"
    named = {"auto": best, "cpu": "cpu"} | ({"cuda": best} if gpus else {}) | {gpu: gpu for gpu in gpus}
    device = _chosen("--device", asked.device, named)
    half = "bfloat16" if device != "cpu" and torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    dtypes = {"auto": "float32" if device == "cpu" else half} | {each: each for each in DTYPES}
    return replace(asked, device=device, dtype=_chosen("--dtype", asked.dtype, dtypes))


def _for_llamacpp(asked: Settings, models: list[str]) -> Settings:
    """Device `cpu` or `gpu` (all layers); dtype the GGUF type that folders become. A .gguf file keeps its own."""
    for name in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(name) is None:
            mend = 'pip install "efficientllm[llamacpp]"'
            raise UsageError(f"--backend llamacpp needs {name}, which is not installed: {mend}")
    import llama_cpp

    offloads = bool(llama_cpp.llama_supports_gpu_offload())
    devices = {"auto": "gpu", "cpu": "cpu", "gpu": "gpu"} if offloads else {"auto": "cpu", "cpu": "cpu"}
    device = _chosen("--device", asked.device, devices)
    return replace(asked, device=device, dtype=llamacpp_dtype(asked.dtype, models))


def llamacpp_dtype(wanted: str, models: list[str]) -> str:
    """The GGUF type that folders are exported to, f16 where it is left open."""
    from efficientllm.export.gguf_tensors import K_QUANTS, WRITTEN

    if wanted != "auto" and any(model.endswith(".gguf") for model in models):
        raise UsageError(f"--dtype {wanted} cannot change a .gguf file; leave it out (folders become f16 files)")
    if wanted in K_QUANTS:
        raise UsageError(f"--dtype {wanted} is written by llama-quantize alone; name the .gguf file that it made")
    return _chosen("--dtype", wanted, {"auto": "f16"} | {each: each for each in WRITTEN})


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes from "1,4", each once. Raises UsageError for what is no positive number."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text} is not a list of positive numbers such as 1,4")
    return tuple(dict.fromkeys(map(int, parts)))


def _chosen(option: str, value: str, choices: Mapping[str, str]) -> str:
    """What a choice means here. Raises UsageError for what is none."""
    if value not in choices:
        raise UsageError(f"{option} {value} cannot be measured here; choose {', '.join(choices)}")
    return choices[value]
