"""Ratios take out what both sides suffer; every model gets every place in the order; a phase is timed alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientllm.benching.process import measure, turn
from efficientllm.benching.results import ratios, spread

SECONDS = st.floats(1e-4, 1e3)


@given(st.lists(st.tuples(SECONDS, st.floats(1.0, 50.0)), min_size=1, max_size=9), st.floats(0.1, 10.0))
def test_noise_of_a_whole_repeat_falls_out_of_the_ratio(repeats: list[tuple[float, float]], factor: float) -> None:
    first = [seconds * noise for seconds, noise in repeats]
    own = [seconds * factor * noise for seconds, noise in repeats]
    found = ratios(own, first)
    assert found == pytest.approx(dict.fromkeys(("median", "low", "high"), factor))


@given(st.lists(SECONDS, min_size=1, max_size=9))
def test_spread_is_that_of_the_sorted_values(values: list[float]) -> None:
    found = spread(values)
    ordered, middle = sorted(values), len(values) // 2
    median = ordered[middle] if len(values) % 2 else statistics.fmean(ordered[middle - 1 : middle + 1])
    assert (found["low"], found["high"]) == (ordered[0], ordered[-1])
    assert found["median"] == pytest.approx(median)


def test_ratios_are_paired() -> None:
    assert ratios([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])["median"] == 2.0
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


@given(st.integers(1, 6), st.integers(-1, 20))
def test_each_model_has_each_place_once(models: int, start: int) -> None:
    orders = [turn(models, start + repeat) for repeat in range(models)]
    for each in (*orders, *zip(*orders, strict=True)):
        assert sorted(each) == list(range(models))


def test_the_clock_stands_around_each_phase() -> None:
    """Making ready and cleaning up count for nothing, even where a phase fails."""

    class Machine:
        now, ended = 0.0, 0

        def run(self, batch: int) -> Iterator[None]:
            try:
                self.now += 100
                yield
                self.now += 2
                yield
                self.now += 12 / batch
                yield
                self.now += 100
            finally:
                self.ended += 1

    machine = Machine()
    assert measure(machine, 1, lambda: machine.now) == {"prefill_seconds": 2.0, "decode_seconds": 12.0}
    with pytest.raises(ZeroDivisionError):
        measure(machine, 0)
    assert machine.ended == 2
