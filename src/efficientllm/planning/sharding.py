"""Memory of one of several GPUs: what sharding divides, and what each of them gathers to compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from efficientllm.config import DistributedConfig
from efficientllm.distributed.layout import fits_whole, mesh_shape
from efficientllm.planning.memory import StepMemory
from efficientllm.pruning.groups import Space

FP32 = 4  # bytes; what lies outside the blocks is gathered in it whatever the precision


@dataclass(frozen=True)
class Sharding:
    """Copies of the model and shards of each copy, why, and bytes: gathered weights that stand whole at once; whole
    gradients on their way to their shards; what each process sends in a step's gradient reduction and weight gathering
    (ring algorithms: (n - 1) / n of the data a pass)."""

    replicas: int
    shards: int
    why: str
    memory: StepMemory
    gathered: int
    scattered: int
    sent: int

    @property
    def total(self) -> int:
        return self.memory.total + self.gathered + self.scattered


def sharding_of(
    space: Space,
    step: StepMemory,
    wanted: DistributedConfig,
    *,
    gpus: int,
    per_node: int,
    device_memory: int,
    micro_batches: int,
    bf16: bool,
) -> Sharding:
    """What the run will choose on so many GPUs. step: of one process alone. Raises UsageError for a mesh that does not
    fit."""
    parameters = int(space.num_params())
    fits = fits_whole(parameters, device_memory)
    replicas, shards = mesh_shape(wanted, gpus, min(per_node, gpus), fits=fits)
    if wanted.shard == "auto":
        why = "18 bytes a parameter fit" if fits else "18 bytes a parameter do not fit"
        why += f" in 60 % of {device_memory / 1e9:.0f} GB"
    else:
        why = f"distributed.shard {wanted.shard}"
    width = 2 if bf16 else FP32
    layered = sum(math.prod(space.shape(spec, space.widths)) for spec in space.params if spec.layer is not None)
    outside, block = parameters - layered, layered // space.widths.layers
    return Sharding(
        replicas,
        shards,
        why,
        replace(
            step,
            weights=step.weights // shards,
            gradients=step.gradients // shards,
            optimizer=step.optimizer // shards,
            inputs=step.inputs // gpus,
        ),
        0 if gpus == 1 else FP32 * outside + width * (layered if shards == 1 else 2 * block),
        0 if gpus == 1 else FP32 * outside + (width + FP32) * block,
        _sent(outside, layered, replicas, shards, micro_batches, width),
    )


def _sent(outside: int, layered: int, replicas: int, shards: int, micro_batches: int, width: int) -> int:
    """Bytes that one process sends in a step: in every micro-batch, blocks gathered for forward and backward, what is
    outside them once and in fp32, and gradients scattered in fp32; copies of a shard are summed once."""
    gathered = 2 * width * layered + FP32 * outside
    scattered = (gathered + FP32 * (layered + outside)) * (shards - 1) // shards * micro_batches
    summed = 2 * ((layered + outside) // shards) * FP32 * (replicas - 1) // replicas
    return scattered + summed
