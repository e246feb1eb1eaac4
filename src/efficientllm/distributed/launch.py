"""Joining the processes that torchrun has started, and leaving them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from efficientllm.distributed.ranks import ALONE, DEADLINE, Ranks, World
from efficientllm.errors import SharedError

TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
PATIENCE = timedelta(days=30)  # of waits for rank 0's disk, tokenising among them


@contextmanager
def joined() -> Iterator[World]:
    """This process's place: among those of torchrun's environment, or a single process.

    NCCL where there are GPUs, gloo for what lies on the CPU. Each process takes the GPU of its local rank. An error
    that all of them have met is told by rank 0 before any of them leaves.
    """
    if not os.environ.keys() >= TORCHRUN or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    if cuda and local_rank < torch.cuda.device_count():  # else it may still train on the CPU
        torch.cuda.set_device(local_rank)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=DEADLINE)))
    # torchrun's store outlives its workers: what they wrote into it before a restart must not be read after it.
    store = dist.PrefixStore(agreed_name(store, rank, world), store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=DEADLINE
    )
    slow = dist.new_group(backend="gloo", timeout=PATIENCE)
    store.set(f"host/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
    try:
        yield Ranks(rank, world, local_rank, local_world, store=store, slow=slow)
    except BaseException as error:
        # An error of one rank alone leaves at once: to part in order is to wait for ranks that wait in a collective.
        if getattr(error, "agreed", False):
            if rank == 0 and isinstance(error, SharedError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun stops the others as soon as the first has left
            _part(slow)
        raise
    _part(slow)


def agreed_name(store: Any, rank: int, world: int, seconds: float = DEADLINE.total_seconds()) -> str:
    """A name for this start of the processes, the same on all of them and never used before.

    TORCHELASTIC_RESTART_COUNT is none: each node's torchrun counts for itself, and not where it only follows another.
    Rank 0 makes one up and gives it to whoever asks; each other rank asks by a word that it has made up, and takes no
    answer but that to its own, so that what an earlier start has left in the store does no harm. Raises TimeoutError
    after so many seconds without all of them.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        name: str = store.get(f"answer/{own}").decode()  # waits, as long as the store was told to
        store.add(f"{name}/here", 1)
        return name
    answered: set[str] = set()
    end = time.monotonic() + seconds
    while store.add(f"{own}/here", 0) < world - 1:
        for other in range(1, world):
            word = store.get(f"asks/{other}").decode() if store.check([f"asks/{other}"]) else None
            if word is not None and word not in answered:
                store.set(f"answer/{word}", own)
                answered.add(word)
        if time.monotonic() > end:
            raise TimeoutError(f"not all {world} processes have come within {seconds:.0f} seconds")
        time.sleep(0.02)
    return own


def _part(slow: Any) -> None:
    dist.barrier(group=slow)  # rank 0 may hold the store that the others still ask
    dist.destroy_process_group()
