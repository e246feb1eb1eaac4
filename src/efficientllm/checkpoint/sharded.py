"""Checkpoints of several processes: safetensors shards written and read by torch.distributed.checkpoint.

Each process writes what it holds, copies only once; a reader takes from the files the rows that it needs, whatever the
number of processes that wrote them. No pickles: the layout stands in the safetensors' own headers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from efficientllm.distributed.layout import empty_sharded
from efficientllm.distributed.ranks import Ranks
from efficientllm.errors import UsageError

CHUNK = 1 << 24
WHOLE = ("live.", "saliency.")  # tensors of the pruner: every process has them whole


def write_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Writes this process's part of the tensors into a folder that every process sees; returns size and CRC of all
    files. A collective. Raises OSError where a process's disk refuses, on all of them."""
    writer = storage().HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with ranks.patience():  # a slow disk is no hung rank
        try:
            dcp.save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            raise OSError(_cause(error)) from error
        files = sorted(folder.glob("*.safetensors"))
        mine = {file.name: facts(file) for file in files[ranks.rank :: ranks.world]}
    seen = ranks.gathered([file.name for file in files])
    if any(names != seen[0] for names in seen):
        raise OSError("the processes do not see the same files: the run folder must lie on a disk that all nodes share")
    return {name: each for part in ranks.gathered(mine) for name, each in part.items()}


def read_shards(folder: Path, ranks: Ranks, device: torch.device | str) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files as this run's processes keep them. A collective. Raises OSError."""
    reader = storage().HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Any] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        whole = name.startswith(WHOLE) or not len(facts.size)
        if whole:
            tensors[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
        else:
            tensors[name] = empty_sharded(facts.size, facts.properties.dtype, device, ranks)
    try:
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


def facts(file: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return {"bytes": file.stat().st_size, "crc32": value}
