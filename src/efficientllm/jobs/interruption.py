"""Stopping on request: a run between two steps, any other command where it stands."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The user or the system asked to stop; a run has been saved. `signum` is the signal.

    agreed: that all processes of a run leave by it.
    """

    agreed = True

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass
class StopRequest:
    """Set by the first SIGINT or SIGTERM; the second SIGINT raises KeyboardInterrupt at once."""

    signum: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    request = StopRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        if request.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = signum

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, in the place of Ctrl-C: no `except Exception` on the way holds it up."""


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise where the program stands, so that every `finally` clears up what is half done.

    Both leave as Interrupted(message). Without it SIGTERM would end the process at once.
    """

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    old = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _Terminated:
        raise Interrupted(message, signal.SIGTERM) from None
    except KeyboardInterrupt:
        raise Interrupted(message, signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, old)
