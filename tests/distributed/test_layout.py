"""Shares of rows, meshes, reductions and local parts of sharded weights, without starting processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from efficientllm.config import DistributedConfig
from efficientllm.distributed import layout
from efficientllm.distributed.layout import mesh_shape, with_mesh
from efficientllm.distributed.ranks import Ranks
from efficientllm.errors import UsageError
from efficientllm.training.gradient import gradient_norm


@given(rows=st.integers(0, 200), world=st.integers(1, 16), micro_batch=st.integers(1, 9))
def test_shares_cover_every_row_once(rows: int, world: int, micro_batch: int) -> None:
    shares = [range(rows)[Ranks(rank, world).share(rows)] for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    passes = {Ranks(rank, world).rounds(rows, micro_batch) for rank in range(world)}
    assert passes == {max(-(-len(share) // micro_batch) for share in shares)}


@pytest.mark.parametrize(
    ("wanted", "world", "local", "fits", "shape"),
    [
        ({}, 8, 8, True, (8, 1)),
        ({}, 8, 8, False, (1, 8)),
        ({}, 32, 8, False, (4, 8)),
        ({}, 4, 1, False, (1, 4)),
        ({"shard": "hybrid"}, 4, 4, True, (2, 2)),
        ({"shard": "hybrid", "replicate": 4}, 16, 8, True, (4, 4)),
        ({"shard": "full", "replicate": 1}, 6, 6, True, (1, 6)),
        ({"shard": "none"}, 6, 6, False, (6, 1)),
    ],
)
def test_meshes(wanted: dict[str, object], world: int, local: int, fits: bool, shape: tuple[int, int]) -> None:
    assert mesh_shape(DistributedConfig.model_validate(wanted), world, local, fits=fits) == shape


@pytest.mark.parametrize(
    ("wanted", "world"),
    [
        ({"shard": "hybrid", "replicate": 3}, 8),
        ({"shard": "hybrid"}, 2),
        ({"shard": "hybrid", "replicate": 8}, 8),
        ({"shard": "full", "replicate": 2}, 8),
        ({"shard": "none", "replicate": 2}, 8),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(wanted: dict[str, object], world: int) -> None:
    with pytest.raises(UsageError, match=r"distributed\.(replicate|shard)"):
        mesh_shape(DistributedConfig.model_validate(wanted), world, world, fits=True)


def test_the_mesh_goes_to_the_ranks_that_the_watch_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of them would beat, and be patient, unseen: a teacher that loads for long would be taken for a hang."""

    class Mesh:
        ndim = 2

        def get_all_groups(self) -> list[object]:
            return []

        def size(self, dimension: int) -> int:
            return (1, 2)[dimension]

    monkeypatch.setattr(layout, "init_device_mesh", lambda *_, **__: Mesh())
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda *_: None)
    ranks = Ranks(0, 2, 0, 2)
    assert with_mesh(ranks, DistributedConfig(shard="full"), torch.device("cpu"), fits=True) is ranks
    assert ranks.shards == 2


def test_copies_of_shards_clip_by_the_same_norm() -> None:
    """Summed over all processes at once, as scores are: four of them, two copies of two shards, this one's alike."""

    class Four(Ranks):
        shards = 2  # type: ignore[assignment]

        def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor * 4

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert gradient_norm([weight], Four(world=4)) == pytest.approx(50**0.5)
    assert gradient_norm([weight]) == 5.0


def test_every_reduction_meets_its_own_group() -> None:
    """Of two processes (threads here) that somebody else's loop has put into a group, and no other group there is."""
    store = dist.HashStore()

    def reduced(rank: int) -> tuple[int, float, list[int]]:
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        ranks = Ranks(rank, 2, group=group, device=torch.device("cpu"))
        tokens = ranks.all_tokens(torch.full((rank + 1, 1), rank))
        return ranks.largest(5 - rank), float(ranks.over_batch(torch.tensor(1.5))), tokens.flatten().tolist()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(reduced, range(2))) == [(5, 3.0, [0, 1, 1])] * 2
