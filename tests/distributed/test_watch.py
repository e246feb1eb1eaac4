"""Who speaks when a rank hangs: exactly one, and of the right one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from efficientllm.distributed import watch
from efficientllm.distributed.ranks import Ranks


class Left(BaseException):
    """Stands for the end of a process."""


@pytest.mark.parametrize("hung", [0, 2])
@pytest.mark.parametrize("alive", [[0, 1, 2], [1], [2], [0]])
def test_one_rank_names_the_one_that_is_furthest_behind(
    hung: int, alive: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """alive: those whose watch still runs; of a rank that does not come further it may run or not."""

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(watch.os, "_exit", leave)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"beat/{rank}", f"{7 - (rank == hung)} {100.0 + rank}")
        store.set(f"host/{rank}", f"node-{rank}")

    def end(rank: int) -> None:
        with pytest.raises(Left, match=str(watch.EXIT_HUNG)):
            watch._leave(Ranks(rank, 3), store, 6.0)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(end, alive))
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert f"error: rank {hung} (node-{hung}) has not answered for 6 seconds" in said


def test_every_rank_beats_as_often_in_a_call() -> None:
    """Rank 0, which does the work, must not look further than those that wait for it."""
    beats = []
    for rank in (0, 1):
        ranks = Ranks(rank, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.broadcast_object_list", lambda box, **_: None)
            ranks.from_first(lambda: None)
        beats.append(ranks.beats)
    assert beats[0] == beats[1]
