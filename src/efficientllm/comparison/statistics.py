"""Paired differences with their intervals; overlap of sets of units and what chance would give."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy import stats
from statsmodels.stats.multitest import multipletests


@dataclass(frozen=True)
class Interval:
    """A mean difference with its 95 % interval, what it is over (seeds, validation windows, runs of two shapes), and
    how probable so large a one would be if there were none."""

    mean: float
    low: float
    high: float
    over: str
    p: float

    @property
    def resolved(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def over_seeds(own: Sequence[float], other: Sequence[float]) -> Interval:
    """Student's interval of the mean of own - other, paired by seed. Raises ValueError for fewer than two pairs."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    if len(differences) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return _student_interval(statistics.mean(differences), error, len(differences) - 1, "seeds")


def between_groups(own: Sequence[float], other: Sequence[float]) -> Interval:
    """Student's interval of mean(own) - mean(other), unpaired, with one variance for both groups.

    Raises ValueError for fewer than two values in a group.
    """
    if min(len(own), len(other)) < 2:
        raise ValueError("a test between two groups needs at least two values in each")
    degrees = len(own) + len(other) - 2
    squares = sum((len(group) - 1) * statistics.variance(group) for group in (own, other))
    error = math.sqrt(squares / degrees * (1 / len(own) + 1 / len(other)))
    return _student_interval(statistics.mean(own) - statistics.mean(other), error, degrees, "runs")


def _student_interval(mean: float, error: float, degrees: int, over: str) -> Interval:
    half = error * float(stats.t.ppf(0.975, degrees))
    p = 2 * float(stats.t.sf(abs(mean) / error, degrees)) if error > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, over, p)


def surviving(ps: Mapping[str, float], level: float = 0.05) -> set[str]:
    """Names whose difference holds when all are tested together: Holm's procedure, which bounds the chance of even one
    false claim by `level`."""
    if not ps:
        return set()
    rejected = multipletests(list(ps.values()), alpha=level, method="holm")[0]
    return {name for name, holds in zip(ps, rejected, strict=True) if holds}


def over_windows(own: Sequence[float], other: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Paired bootstrap over validation windows of one seed: percentile interval of the mean of own - other.

    It says how far the choice of the validation text matters, not how far another seed would.
    """
    differences = [a - b for a, b in zip(own, other, strict=True)]
    chooser, count = random.Random(seed), len(differences)
    means = sorted(statistics.fmean(chooser.choices(differences, k=count)) for _ in range(draws))
    low, high = means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
    beyond = min(sum(mean <= 0 for mean in means), sum(mean >= 0 for mean in means))
    p = min(1.0, 2 * (beyond + 1) / (draws + 1))
    return Interval(statistics.fmean(differences), low, high, "windows", p)


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
