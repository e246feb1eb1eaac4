"""When to prune: pure functions of the position in the run (tokens in our loop, steps in anybody's)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# The share of the way from source to final size that is still to go after a fraction x of the span; beside them there
# is "exponential", below. A recipe knows all of them by name (config/prune.py: curve).
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cubic": lambda x: (1.0 - x) ** 3,  # gradual magnitude pruning, arXiv 1710.01878, eq. 1
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def scheduled_size(x: float, source: float, final: float, curve: str) -> float:
    """Size allowed after a fraction x of the span, from `source` at x <= 0 to `final` at x >= 1.

    "exponential" removes the same share of what is left at every moment: source * (final / source)^x.
    """
    x = min(1.0, max(0.0, x))
    if curve == "exponential":
        return source * (final / source) ** x
    return final + (source - final) * CURVES[curve](x)


class Schedule(Protocol):
    def wants(self, position: float, size: float, events: int) -> bool:
        """Whether one more event is due, for a model of `size` after `events` events."""
        ...


@dataclass(frozen=True)
class SpanSchedule:
    """A target size reached over a span of the run. start, end, and position share a unit."""

    start: float
    end: float
    source: float
    final: float
    curve: str = "cubic"

    def wants(self, position: float, size: float, events: int) -> bool:
        if position < self.start:
            return False
        if position >= self.end:
            return True  # the feasible shapes, not the curve, say when it is over
        x = (position - self.start) / (self.end - self.start)
        return size > scheduled_size(x, self.source, self.final, self.curve)


@dataclass(frozen=True)
class EverySchedule:
    """The paper's cadence: one event every N batches from `start` on; the span follows from it.

    every: N batches, in the unit of start and position.
    """

    start: float
    every: float

    def wants(self, position: float, size: float, events: int) -> bool:
        return events < math.floor((position - self.start) / self.every + 1e-9)
