"""Medians with their spread, and ratios between models that were measured in turn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of the repeats."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises statistics.StatisticsError for no values."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(own: Sequence[float], first: Sequence[float]) -> Spread:
    """Of own / first repeat by repeat, so that what slows a whole repeat down on both sides falls out."""
    return spread([a / b for a, b in zip(own, first, strict=True)])


def turn(models: int, repeat: int) -> list[int]:
    """The order of the models within a repeat: each repeat begins with the next one, so that none is always first."""
    return [(repeat + offset) % models for offset in range(models)]


def energy_per_token(joules: Sequence[float | None], tokens: int) -> float | None:
    """Joules over all repeats by their tokens (`tokens` a repeat); None where some are unknown, or where the counter
    never moved: it is read too seldom for runs as short as these."""
    known = [value for value in joules if value is not None]
    total = sum(known)
    return total / (tokens * len(known)) if len(known) == len(joules) and total > 0 else None
