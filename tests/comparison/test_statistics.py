"""Intervals against what a textbook gives, overlap by chance against enumeration."""

from __future__ import annotations

import math
import random
import statistics
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientllm.comparison.statistics import (
    between_groups,
    chance_jaccard,
    jaccard,
    over_seeds,
    over_windows,
    surviving,
)


def test_paired_interval_over_seeds() -> None:
    interval = over_seeds([3.1, 3.4, 3.2], [3.0, 3.2, 3.1])  # differences 0.1, 0.2, 0.1
    half = 4.302653 * (0.1 / math.sqrt(3)) / math.sqrt(3)
    assert interval.mean == pytest.approx(0.4 / 3)
    assert (interval.low, interval.high) == pytest.approx((0.4 / 3 - half, 0.4 / 3 + half))
    assert not interval.resolved
    assert over_seeds([1.10, 1.11, 1.09, 1.10], [1.0, 1.0, 1.0, 1.0]).resolved
    with pytest.raises(ValueError, match="at least two"):
        over_seeds([1.0], [1.0])


def test_bootstrap_over_windows_is_as_wide_as_the_normal_interval() -> None:
    draw = random.Random(3)
    own = [draw.gauss(3.0, 0.5) for _ in range(800)]
    other = [value - draw.gauss(0.05, 0.2) for value in own]  # much in common: pairing must take it out
    interval = over_windows(own, other)
    differences = [a - b for a, b in zip(own, other, strict=True)]
    half = 1.96 * statistics.stdev(differences) / math.sqrt(800)
    assert interval.mean == pytest.approx(statistics.fmean(differences))
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.15)


@given(st.integers(1, 7), st.data())
def test_chance_jaccard_equals_enumeration(total: int, data: st.DataObject) -> None:
    first, second = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    a = frozenset(range(first))
    want = statistics.fmean(jaccard([a, frozenset(b)]) for b in combinations(range(total), second))
    assert chance_jaccard(first, second, total) == pytest.approx(want)


@pytest.mark.parametrize(
    ("degrees", "critical"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (31, 2.0395)]
)
def test_students_interval_and_tail_are_those_of_the_tables(degrees: int, critical: float) -> None:
    differences = [1.0, -1.0] * (degrees // 2) + ([1.0, 0.0, -1.0] if degrees % 2 == 0 else [1.0, -1.0])
    own = [value + 1.0 for value in differences[: degrees + 1]]
    interval = over_seeds(own, [0.0] * (degrees + 1))
    error = statistics.stdev(own) / math.sqrt(degrees + 1)
    assert interval.high - interval.mean == pytest.approx(critical * error, rel=2e-4)
    shift = critical * error - interval.mean  # a mean at the critical value has p = 5 %
    assert over_seeds([each + shift for each in own], [0.0] * len(own)).p == pytest.approx(0.05, abs=1e-4)


def test_holm_is_stricter_than_one_test_and_milder_than_bonferroni() -> None:
    assert surviving({}) == set()
    assert surviving({"a": 0.04}) == {"a"}
    assert surviving({"a": 0.04, "b": 0.03}) == set()
    assert surviving({"a": 0.01, "b": 0.02, "c": 0.04}) == {"a", "b", "c"}  # Bonferroni would keep `a` alone
    assert surviving({"a": 0.001, "b": 0.04, "c": 0.03}) == {"a"}


def test_p_and_interval_agree() -> None:
    for other in ([1.0, 1.3, 1.1], [1.01, 1.3, 1.22]):
        interval = over_seeds([1.2, 1.4, 1.3], other)
        assert interval.resolved == (interval.p < 0.05)
    assert over_seeds([1.5, 2.5], [1.0, 2.0]).p == 0.0
    assert over_seeds([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_two_groups_against_a_textbook() -> None:
    interval = between_groups([3.0, 4.0, 5.0], [1.0, 2.0])  # pooled variance (2 + 0.5) / 3
    half = 3.18244631 * math.sqrt(2.5 / 3 * (1 / 3 + 1 / 2))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    with pytest.raises(ValueError, match="two values in each"):
        between_groups([1.0], [1.0, 2.0])
