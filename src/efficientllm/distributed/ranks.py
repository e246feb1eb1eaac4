"""This process among several that share a run: how their parts come together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from efficientllm.errors import SharedError, UsageError
from efficientllm.pruning.shards import ALONE, World

__all__ = ["ALONE", "DEADLINE", "Ranks", "World", "error_of_all"]

T = TypeVar("T")
DEADLINE = timedelta(minutes=30)  # of a collective; the watch (watch.py) speaks earlier and names the rank


@dataclass
class Ranks(World):
    """A process's place among those that torchrun has started, and their collectives.

    mesh: over all ranks, two dimensions ("replicate", "shard"); None until the recipe's is known (layout.py). slow:
    a group of its own for waits without a deadline. group: of the ranks, where they are not all that there are. device:
    where the group reduces, if nowhere else. communicated: bytes that this process has put into the reductions below.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    mesh: DeviceMesh | None = None
    store: Any = None
    slow: Any = None
    group: Any = None
    device: torch.device | None = None
    communicated: int = field(default=0, compare=False)
    beats: int = field(default=0, compare=False)  # how far this process has come (distributed.watch)
    patient: bool = field(default=False, compare=False)  # in a wait that may take as long as it takes

    @property
    def shards(self) -> int:
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def beat(self) -> None:
        self.beats += 1

    def over_shards(self, tensor: Tensor) -> Tensor:
        """Over all processes, divided by the copies: within each group of shards alone, two copies could add up in
        another order, and choose other units."""
        if self.shards == 1:
            return tensor
        return self._sum(tensor).div_(self.world // self.shards)

    def over_batch(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor)

    def _sum(self, tensor: Tensor) -> Tensor:
        there = tensor.contiguous() if self.device is None else tensor.to(self.device).contiguous()
        self.communicated += there.numel() * there.element_size()
        self.beat()
        dist.all_reduce(there, group=self.group)
        self.beat()
        return there.to(tensor.device)

    def all_tokens(self, tensor: Tensor) -> Tensor:
        """Rows may differ in number between processes (by the rows of one sequence)."""
        count = torch.zeros(self.world, dtype=torch.int64, device=tensor.device)
        count[self.rank] = len(tensor)
        counts: list[int] = self._sum(count).tolist()
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        self.communicated += padded.numel() * padded.element_size()
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def largest(self, number: int) -> int:
        # On the CPU where the group reduces there too: through gloo, beside the GPU's work.
        tensor = torch.tensor([number], dtype=torch.int64, device=self.device)
        self.beat()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        self.beat()
        return int(tensor)

    def wait(self) -> None:
        with self.patience():
            dist.barrier(group=self.slow)

    @contextmanager
    def patience(self) -> Iterator[None]:
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before
            self.beat()

    def from_first(self, make: Callable[[], T]) -> T:
        box: list[Any] = [None, None]
        with self.patience():  # once, so that every rank beats as often (distributed.watch)
            if self.leads:
                try:
                    box[0] = make()
                except UsageError as caught:
                    box[1] = str(caught)
            dist.broadcast_object_list(box, src=0, group=self.slow)
        if box[1] is not None:
            raise SharedError(box[1])
        result: T = box[0]
        return result

    def gathered(self, part: T) -> list[T]:
        parts: list[Any] = [part] * self.world
        with self.patience():
            dist.all_gather_object(parts, part, group=self.slow)
        return parts

    def together(self, do: Callable[[], T]) -> T:
        message: str | None = None
        result: Any = None
        try:
            with self.patience():
                result = do()
        except UsageError as caught:
            message = str(caught)
        said = self.gathered(message)
        failed = [rank for rank, each in enumerate(said) if each is not None]
        if failed:
            raise SharedError(f"rank {failed[0]}: {said[failed[0]]}" if failed[0] else said[0])
        done: T = result
        return done


def error_of_all(ranks: World, message: str) -> UsageError:
    """An error that every process meets alike."""
    return UsageError(message) if ranks.world == 1 else SharedError(message)
