"""A weight as this process holds it: whole, or the rows of it that a DTensor keeps here.

Shards are cut along dimension 0, in pieces of ceil(rows / processes) (FSDP2's layout). Whatever acts on rows or columns
of a weight acts on the local piece; what is summed over rows is summed over the other processes of the World.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import call
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

T = TypeVar("T")


class World:
    """The processes that train one model together, as one of them sees it. This one is alone: it has every row and the
    whole of every weight, and waits for nobody. distributed/ranks.py has those of several.

    Every process calls the same methods in the same order and gets the same bits back. rank: its number among them;
    world: how many there are; local_rank, local_world: the same on its node; mesh: how weights lie over them.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    mesh: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder and speaks to the user."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Pieces into which every weight is cut."""
        return 1

    def share(self, rows: int) -> slice:
        """This process's rows of so many: contiguous, the first processes take one more where they do not divide."""
        each, more = divmod(rows, self.world)
        first = self.rank * each + min(self.rank, more)
        return slice(first, first + each + (self.rank < more))

    def rounds(self, rows: int, micro_batch: int) -> int:
        """Micro-batches that the process with the most of so many rows needs: as many forward passes as every
        process makes, because sharded weights are gathered in each."""
        return math.ceil(math.ceil(rows / self.world) / micro_batch)

    run: Any = staticmethod(call)  # a body that uses the model: as it is, and without a frame of its own

    def last(self, is_last: bool) -> None:
        """Whether the coming backward pass is the step's last."""

    def beat(self) -> None:
        """Says that this process has come further."""

    def over_shards(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that hold other rows of the weights. May write into the given tensor."""
        return tensor

    def over_batch(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that read other rows of the batch. May write into the given tensor."""
        return tensor

    def all_tokens(self, tensor: Tensor) -> Tensor:
        """Inputs of all processes joined, (all tokens, ...), from each one's (tokens, ...)."""
        return tensor

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number

    def wait(self) -> None:
        """Until every process has come here, however long that takes."""

    def patience(self) -> AbstractContextManager[None]:
        """Around a wait that may take as long as it takes."""
        return nullcontext()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. What it raises for the user is raised on every rank."""
        return make()

    def gathered(self, part: T) -> list[T]:
        """What each rank has given, by rank."""
        return [part]

    def together(self, do: Callable[[], T]) -> T:
        """Every rank's own `do()`; where one raises for the user, all do, and the lowest rank has the words.

        `do` must not speak to the other processes.
        """
        return do()


ALONE = World()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is laid out over several processes (a DTensor), be it in copies alone."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here, detached; writing into it writes into the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The row of the whole tensor at which its local part begins. Raises ValueError for shards of another kind."""
    if not isinstance(tensor, DTensor):
        return 0
    first = 0
    for place, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if not (isinstance(placement, Shard) and placement.dim == 0):
            raise ValueError(f"a weight is laid out as {placement}; only shards along dimension 0 are understood")
        pieces = tensor.device_mesh.size(place)
        piece = -(-tensor.shape[0] // pieces)
        first = min(tensor.device_mesh.get_local_rank(place) * piece, tensor.shape[0])
    return first


def local_place(tensor: Tensor, dim: int, indices: Tensor, rows: Tensor | None = None) -> tuple[slice | Tensor, ...]:
    """What of a whole tensor's slice (groups.Slice) lies here, as an index into the local part, on its device."""
    part = local(tensor)
    along = indices if rows is None else rows
    if isinstance(tensor, DTensor) and (dim == 0 or rows is not None):
        along = along - first_row(tensor)
        here = (along >= 0) & (along < len(part))
        along, indices = along[here], indices[here]
    if rows is None:
        return *[slice(None)] * dim, (along if dim == 0 else indices).to(part.device)
    return along.to(part.device), *[slice(None)] * (dim - 1), indices.to(part.device)


def fill(tensor: Tensor, dim: int, indices: Tensor, rows: Tensor | None = None) -> None:
    """Zeroes a slice of the whole tensor, in the part that lies here."""
    local(tensor)[local_place(tensor, dim, indices, rows)] = 0.0


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process: a collective for one that is sharded, the tensor itself otherwise."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(full: Tensor, pattern: Tensor) -> Tensor:
    """A whole contiguous tensor, the same on every process, laid out as the DTensor `pattern` is: this process keeps a
    copy of its own rows, and nothing is communicated."""
    assert isinstance(pattern, DTensor)
    pieces, mine = 1, 0
    for place, placement in enumerate(pattern.placements):
        if not placement.is_replicate():
            pieces, mine = pattern.device_mesh.size(place), pattern.device_mesh.get_local_rank(place)
    piece = -(-full.shape[0] // pieces)
    first = min(mine * piece, full.shape[0])
    rows = full[first : min(first + piece, full.shape[0])].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        rows, pattern.device_mesh, pattern.placements, run_check=False, shape=full.shape, stride=full.stride()
    )
