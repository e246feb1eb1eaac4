"""Checkpoints of several processes: safetensors shards written and read by torch.distributed.checkpoint.

Each process writes what it holds, copies only once; a reader takes from the files the rows that it needs, whatever the
number of processes that wrote them. No pickles: the layout stands in the safetensors' own headers.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from efficientllm.distributed.layout import empty_sharded
from efficientllm.distributed.ranks import World
from efficientllm.errors import UsageError
from efficientllm.training.snapshot import PREFIXES

T = TypeVar("T")
CHUNK = 1 << 24


def write_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: World) -> dict[str, Any]:
    """Writes this process's part of the tensors into a folder that every process sees; returns size and CRC of all
    files. A collective. Raises OSError where a process's disk refuses, on all of them."""
    writer = storage().HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with ranks.patience():  # a slow disk is no hung rank
        try:
            dcp.save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            raise OSError(_cause(error)) from error
    parts = agreed(ranks, lambda: _written(folder, ranks))
    if any(names != parts[0][0] for names, _ in parts):
        raise OSError("the processes do not see the same files: the run folder must lie on a disk that all nodes share")
    return {name: each for _, part in parts for name, each in part.items()}


def _written(folder: Path, ranks: World) -> tuple[list[str], dict[str, Any]]:
    """Names of all files; size and CRC of this process's share of them."""
    files = sorted(folder.glob("*.safetensors"))
    return [file.name for file in files], {file.name: size_and_crc(file) for file in files[ranks.rank :: ranks.world]}


def agreed(ranks: World, do: Callable[[], T]) -> list[T]:
    """What `do` returns on each rank. A collective; where the disk refuses one, OSError is raised on all of them, so
    that none waits for another that has left."""
    found: T | None = None
    refused: str | None = None
    with ranks.patience():
        try:
            found = do()
        except OSError as error:
            refused = str(error)
    parts: list[Any] = []
    for rank, (each, said) in enumerate(ranks.gathered((found, refused))):
        if said is not None:
            raise OSError(f"rank {rank}: {said}" if rank else said)
        parts.append(each)
    return parts


def read_shards(folder: Path, ranks: World, device: torch.device | str) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files as this run's processes keep them. A collective. Raises OSError where one
    process cannot read, on all of them."""
    reader = storage().HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    agreed(ranks, lambda: layout.update(reader.read_metadata().state_dict_metadata))
    for name, each in layout.items():
        whole = name.startswith(PREFIXES) or not len(each.size)
        if whole:
            tensors[name] = torch.empty(each.size, dtype=each.properties.dtype)
        else:
            tensors[name] = empty_sharded(each.size, each.properties.dtype, device, ranks)
    try:
        with ranks.patience(), warnings.catch_warnings():  # a slow disk is no hung rank; one process is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=ranks.world == 1)
    except CheckpointException as error:
        raise OSError(_cause(error)) from error
    return tensors


def storage() -> Any:
    """PyTorch's storage of safetensors. Raises UsageError where this torch has none."""
    try:
        from torch.distributed.checkpoint import hf_storage
    except ImportError as error:
        raise UsageError(
            f"checkpoints of several processes need torch 2.9 or newer, and this is {torch.__version__}; install that"
        ) from error
    return hf_storage


def _cause(error: CheckpointException) -> str:
    """What went wrong on the first process that failed."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {cause}"


def size_and_crc(file: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file, as a manifest has them."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return {"bytes": file.stat().st_size, "crc32": value}
