"""Paired differences with their intervals; overlap of sets of units and what chance would give."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

# Student's t, two-sided 95 %, by degrees of freedom; 1.96 beyond (Fisher and Yates 1963, table III).
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean difference with its 95 % interval, and what it is over: seeds or validation windows."""

    mean: float
    low: float
    high: float
    over: str

    @property
    def resolved(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def over_seeds(own: Sequence[float], other: Sequence[float]) -> Interval:
    """Student's interval of the mean of own - other, paired by seed. Raises ValueError for fewer than two pairs."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    if len(differences) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    mean = statistics.mean(differences)
    degrees = len(differences) - 1
    student = _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else 1.96
    half = student * statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half, "seeds")


def over_windows(own: Sequence[float], other: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Paired bootstrap over validation windows of one seed: percentile interval of the mean of own - other.

    It says how far the choice of the validation text matters, not how far another seed would.
    """
    differences = [a - b for a, b in zip(own, other, strict=True)]
    chooser, count = random.Random(seed), len(differences)
    means = sorted(statistics.fmean(chooser.choices(differences, k=count)) for _ in range(draws))
    low, high = means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
    return Interval(statistics.fmean(differences), low, high, "windows")


def jaccard(sets: Sequence[frozenset[int]]) -> float:
    """Mean over all pairs of |A and B| / |A or B|."""
    pairs = list(combinations(sets, 2))
    return statistics.fmean(len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs)


def chance_jaccard(first: int, second: int, total: int) -> float:
    """Expected Jaccard index of two independent uniform subsets of `first` and `second` out of `total` units.

    The overlap is hypergeometric; the expectation is summed exactly.
    """
    if first == 0 and second == 0:
        return 1.0
    ways = math.comb(total, second)
    return sum(
        math.comb(first, common) * math.comb(total - first, second - common) / ways * common / (first + second - common)
        for common in range(max(0, first + second - total), min(first, second) + 1)
    )
