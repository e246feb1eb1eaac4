"""Accelerators: peak dense rates and memory, from their makers' data sheets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from efficientllm.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """flops, fp32: dense matrix products a second at most, in bf16 and in plain fp32 (without TF32, which PyTorch
    leaves off). memory: bytes."""

    name: str
    flops: float
    fp32: float
    memory: float
    sheet: str

    def peak(self, *, bf16: bool) -> float:
        return self.flops if bf16 else self.fp32


_GB = 1e9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 312e12, 19.5e12, 40 * _GB, "NVIDIA A100 datasheet, SXM"),
        Gpu("a100-80gb", 312e12, 19.5e12, 80 * _GB, "NVIDIA A100 datasheet, SXM"),
        Gpu("h100-80gb", 989e12, 67e12, 80 * _GB, "NVIDIA H100 datasheet, SXM"),
        Gpu("h200-141gb", 989e12, 67e12, 141 * _GB, "NVIDIA H200 datasheet, SXM"),
        Gpu("l4-24gb", 121e12, 30.3e12, 24 * _GB, "NVIDIA L4 datasheet"),
        Gpu("l40s-48gb", 362e12, 91.6e12, 48 * _GB, "NVIDIA L40S datasheet"),
        Gpu("rtx4090-24gb", 165e12, 82.6e12, 24 * _GB, "NVIDIA Ada GPU architecture whitepaper, fp32 accumulation"),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises UsageError that names the nearest."""
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.0)[0]
        raise UsageError(f"'{name}' is no GPU known here: did you mean {near}? Known are {', '.join(GPUS)}")
    return GPUS[name]
