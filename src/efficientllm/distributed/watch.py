"""A watch over a run of several processes: one that no longer answers is named, and the run ends so that torchrun may
start it again, instead of waiting in a collective for a day."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from efficientllm.distributed.ranks import Ranks, World

EXIT_HUNG = 75  # EX_TEMPFAIL: try again
OTHERS_FIRST = 3.0  # seconds; every process looks at least once a second


@contextmanager
def watched(ranks: World, seconds: float) -> Iterator[None]:
    """While the body runs, a process that has not come further (Ranks.beat) for `seconds` ends this run.

    Each process tells the others through the store how far it is. One that waits too long names the rank that is
    furthest behind, and leaves with exit code EXIT_HUNG.
    """
    if not isinstance(ranks, Ranks):
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(ranks, seconds, stop), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(ranks: Ranks, seconds: float, stop: threading.Event) -> None:
    store = ranks.store.clone() if hasattr(ranks.store, "clone") else ranks.store
    seen, since = -1, time.monotonic()
    while not stop.wait(min(1.0, seconds / 5)):
        if ranks.patient or ranks.beats != seen:
            seen, since = ranks.beats, time.monotonic()
        store.set(f"beat/{ranks.rank}", f"{seen} {time.time()}")
        if time.monotonic() - since > seconds:
            _leave(ranks, store, seconds)


def _leave(ranks: Ranks, store: Any, seconds: float) -> None:
    """Names the rank that has come least far; of several the one that was heard of last the longest ago.

    The first to get here has the words; the one that is named only where no other has come in time.
    """
    places: dict[int, tuple[int, float]] = {}
    for rank in range(ranks.world):
        place, heard = store.get(f"beat/{rank}").split() if store.check([f"beat/{rank}"]) else (-1, 0.0)
        places[rank] = int(place), float(heard)
    behind = min(places, key=lambda rank: places[rank])
    if ranks.rank == behind:
        time.sleep(OTHERS_FIRST)
    if store.add("named", 1) == 1:
        host = store.get(f"host/{behind}").decode()
        print(
            f"error: rank {behind} ({host}) has not answered for {seconds:.0f} seconds (distributed.timeout); what is "
            "saved is not lost: start the same command again, or let torchrun do so with --max-restarts",
            file=sys.stderr,
            flush=True,
        )
    else:
        time.sleep(1.0)  # torchrun ends all others with the first: let the sentence come before
    os._exit(EXIT_HUNG)
