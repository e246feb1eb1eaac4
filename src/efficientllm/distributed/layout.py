"""How weights lie over the processes, and the one function that wraps a model for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from efficientllm.distributed.ranks import ALONE, DEADLINE, Ranks, World
from efficientllm.errors import UsageError

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import DistributedConfig

T = TypeVar("T")


BYTES_WHOLE = 18  # a parameter's fp32 weight, gradient and two moments, and its bf16 copy while it computes
ROOM_FOR_MODEL = 0.6  # of a device's memory; the rest is for activations


def fits_whole(parameters: int, memory: int) -> bool:
    """Whether a device of so many bytes can keep a model of so many parameters whole, with room for activations."""
    return parameters * BYTES_WHOLE <= ROOM_FOR_MODEL * memory


def mesh_shape(wanted: DistributedConfig, world: int, local_world: int, *, fits: bool) -> tuple[int, int]:
    """(replicas, shards) of each weight; their product is the number of processes.

    auto: copies where a model fits whole beside its moments; else shards within a node and copies over nodes (over all
    processes, where each has a node of its own). Raises UsageError for a mesh that does not fit the processes.
    """
    nodes = max(1, world // local_world)
    kind = wanted.shard
    if kind == "auto":
        kind = "none" if fits else "hybrid" if 1 < nodes < world else "full"
    if kind == "none" or kind == "full":
        replicas = world if kind == "none" else 1
        if wanted.replicate not in ("auto", replicas):
            raise UsageError(
                f"distributed.replicate {wanted.replicate} does not go with shard {kind} on {world} processes, which "
                f"keeps {replicas} copies; leave it out, or set distributed.shard to hybrid"
            )
        return replicas, world // replicas
    replicas = (nodes if nodes > 1 else 2) if wanted.replicate == "auto" else wanted.replicate
    if world % replicas or world == replicas:
        raise UsageError(
            f"distributed.replicate {replicas} does not divide {world} processes into shards; choose a divisor of "
            f"{world} below it, or distributed.shard none or full"
        )
    return replicas, world // replicas


def with_mesh(ranks: World, wanted: DistributedConfig, device: torch.device, *, fits: bool) -> World:
    """The same ranks, which from now on have the mesh that the recipe asks for: whoever knows them beats and waits for
    one watch. Collectives wait longer than that does."""
    if not isinstance(ranks, Ranks):
        return ranks
    shape = mesh_shape(wanted, ranks.world, ranks.local_world, fits=fits)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for group in (dist.group.WORLD, *mesh.get_all_groups()):
        # A mesh's own groups begin with PyTorch's default: ten minutes with NCCL, whatever the processes' own was.
        dist.distributed_c10d._set_pg_timeout(deadline(wanted.timeout), group)
    ranks.mesh = mesh
    return ranks


def deadline(patience: float) -> timedelta:
    """Of a collective, where the watch names a hung rank after `patience` seconds: never the earlier of the two."""
    return max(DEADLINE, 2 * timedelta(seconds=patience))


class Root(nn.Module):
    """Runs whatever touches the model inside its own forward, where sharded weights are there to be read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, body: Callable[[], T]) -> T:
        return body()


class Runner(Protocol):
    """Whatever touches a model does so inside `run`: as it is where a process is alone (pruning.shards.ALONE)."""

    def run(self, body: Callable[[], T], /) -> T: ...

    def last(self, is_last: bool) -> None: ...


class Sharded:
    """Runs a body inside the wrapped root."""

    def __init__(self, root: FSDPModule, blocks: Sequence[FSDPModule]) -> None:
        self._root, self._blocks = root, blocks

    def run(self, body: Callable[[], T], /) -> T:
        result: T = self._root(body)  # type: ignore[operator]
        if not torch.is_grad_enabled():  # some keep their weights gathered, for a backward pass that never comes
            for unit in (*self._blocks, self._root):
                unit.reshard()
        return result

    def last(self, is_last: bool) -> None:
        """Whether the coming backward pass is the step's last: copies of a shard sum their gradients then, at once."""
        self._root.set_requires_all_reduce(is_last)


def wrap(
    model: Any,
    blocks: Sequence[nn.Module],
    ranks: World,
    *,
    compile_blocks: bool,
    bf16: bool,
) -> Runner:
    """Compile, then sharding, on a model whose weights may have no memory yet.

    On one process nothing is sharded. With several, each block and the root (embedding, last norm, LM head) are a unit
    of FSDP2: weights are kept in fp32, gradients are reduced in fp32. Blocks are gathered in the dtype of computation;
    the root in fp32 and inputs as they are, so that under autocast the stem stays in fp32, as on one process. blocks:
    the model's layers.
    """
    if compile_blocks:
        torch._dynamo.reset()  # its cache counts the graphs of all former shapes against one limit
        for block in blocks:  # its forward alone: hooks that gather weights stay outside the graph
            block.forward = torch.compile(block.forward, dynamic=False)
    if ranks.mesh is None:
        return ALONE
    compute = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    keeps = ranks.shards == 1  # copies stay gathered from forward to backward
    units = [fully_shard(block, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=not keeps) for block in blocks]
    return Sharded(fully_shard(Root(model), mesh=ranks.mesh, mp_policy=rest), units)


class Gathered:
    """Runs a body on a model that somebody else's FSDP2 wraps in place: what a pass without a gradient leaves gathered
    would be read by the next one, whatever has happened to the shards meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._reshard()

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def run(self, body: Callable[[], T], /) -> T:
        result = body()
        if not torch.is_grad_enabled():
            self._reshard()
        return result

    def last(self, is_last: bool) -> None:
        """Somebody else's loop says when gradients are summed."""


def unwrapped(model: Any) -> Any:
    """The model within what DistributedDataParallel or torch.compile has made of it."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def as_found(model: nn.Module, group: Any) -> tuple[Runner, World]:
    """What runs a model that somebody else's loop trains, and the processes of a group that share its batches: copies
    (DistributedDataParallel) or shards (FSDP2), as its weights lie. group: None where this process is alone.

    Raises UsageError for processes without a group, and for weights that lie in another way.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if group is None and world > 1:
        raise UsageError(
            f"this is one of {world} processes, and Pruner has not been told which of them train its model: each would "
            "zero units of its own; give it process_group=torch.distributed.group.WORLD, or the group that shares the "
            "batches"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UsageError("Pruner does not know FSDP1's flat weights; shard with FSDP2 (fully_shard, fsdp_version 2)")
    runner = Gathered(model)
    meshes = {_mesh_of(name, weight) for name, weight in model.named_parameters()}
    members = 1 if group is None else dist.get_world_size(group)
    if len(meshes) > 1 or any(mesh is not None and mesh.size() != members for mesh in meshes):
        raise UsageError(
            "the weights are not all sharded over the processes of process_group; shard the whole model on one mesh "
            "(fully_shard), and give its ranks as the group"
        )
    mesh = meshes.pop()
    if members == 1:
        return (ALONE if mesh is None else runner), ALONE
    device = next(model.parameters()).device
    return runner, Ranks(dist.get_rank(group), members, mesh=mesh, group=group, device=device)


def _mesh_of(name: str, weight: Tensor) -> DeviceMesh | None:
    """Over which a weight is sharded; None for one that is whole here."""
    if hasattr(weight, "ds_id"):
        raise UsageError("Pruner does not know DeepSpeed's shards; use FSDP2 (fully_shard) or copies (DDP)")
    if not isinstance(weight, DTensor):
        return None
    *copies, last = weight.placements
    if last != Shard(0) or not all(each.is_replicate() for each in copies):
        raise UsageError(
            f"{name} is laid out as {weight.placements}; Pruner knows copies (DDP) and FSDP2's shards along dimension "
            "0, no tensor parallelism: leave that out"
        )
    mesh: DeviceMesh = weight.device_mesh
    return mesh


def empty_sharded(shape: torch.Size, dtype: torch.dtype, device: torch.device | str, ranks: World) -> Tensor:
    """A tensor of this whole shape without content, laid out as FSDP2 lays out weights; plain on one process."""
    if ranks.mesh is None or not len(shape):
        return torch.empty(shape, dtype=dtype, device=device)
    return _pattern(shape, dtype, device, ranks)


def _pattern(shape: torch.Size, dtype: torch.dtype, device: torch.device | str, ranks: World) -> DTensor:
    mesh = ranks.mesh
    assert mesh is not None
    piece = -(-shape[0] // ranks.shards)
    mine = mesh.get_local_rank(mesh.ndim - 1)
    rows = max(0, min(piece, shape[0] - mine * piece))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        torch.empty((rows, *shape[1:]), dtype=dtype, device=device),
        mesh,
        (Replicate(), Shard(0)),
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )
