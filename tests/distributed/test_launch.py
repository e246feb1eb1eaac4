"""How processes agree on a name for their start, whatever an earlier one has left behind; how long collectives wait."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from efficientllm.distributed.launch import agreed_name
from efficientllm.distributed.layout import deadline


def names(store: dist.Store, world: int) -> list[str]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: agreed_name(store, rank, world, 20.0), range(world)))


def test_every_start_has_a_name_of_its_own() -> None:
    """The second finds the words and answers of the first in the store, as after a restart by torchrun."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    first, second = names(store, 4), names(store, 4)
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


def test_a_rank_that_never_comes_does_not_hold_the_first_for_ever() -> None:
    store = dist.HashStore()
    store.set("asks/1", "long gone")
    with pytest.raises(TimeoutError, match="not all 2 processes"):
        agreed_name(store, 0, 2, 0.2)


def test_the_watch_speaks_before_a_collective_gives_up() -> None:
    assert deadline(600.0) == timedelta(minutes=30)
    assert deadline(7200.0) > timedelta(seconds=7200)
