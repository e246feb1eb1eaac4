"""Joining the processes that torchrun has started, and leaving them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from efficientllm.distributed.ranks import ALONE, Ranks

DEADLINE = timedelta(minutes=30)  # of a collective; the watch (watch.py) speaks earlier and names the rank
PATIENCE = timedelta(days=30)  # of waits for rank 0's disk, tokenising among them


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process's Ranks: those of torchrun's environment, or a single process.

    NCCL where there are GPUs, gloo for what lies on the CPU. Each process takes the GPU of its local rank.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=DEADLINE)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=DEADLINE
    )
    slow = dist.new_group(backend="gloo", timeout=PATIENCE)
    store.set(f"host/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
    try:
        yield Ranks(rank, world, local_rank, local_world, store=store, slow=slow)
        dist.barrier(group=slow)  # rank 0 may hold the store that the others still ask
    finally:
        dist.destroy_process_group()
