"""Schedules are pure, monotone, and end where they should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientllm.pruning.schedule import EverySchedule, SpanSchedule, scheduled_size

CURVES = st.sampled_from(["linear", "cubic", "cosine", "exponential"])


@given(CURVES, st.floats(0, 1), st.floats(0, 1))
def test_curves_fall_from_source_to_final(curve: str, first: float, second: float) -> None:
    early, late = sorted((first, second))
    sizes = [scheduled_size(x, 1000.0, 400.0, curve) for x in (early, late)]
    assert 400.0 - 1e-9 <= sizes[1] <= sizes[0] + 1e-9 <= 1000.0 + 1e-6
    assert scheduled_size(0.0, 1000.0, 400.0, curve) == pytest.approx(1000.0)
    assert scheduled_size(1.0, 1000.0, 400.0, curve) == pytest.approx(400.0)


def test_cubic_cuts_first_and_fast() -> None:
    assert scheduled_size(0.5, 1000.0, 0.0, "cubic") == pytest.approx(125.0)


def test_span_waits_for_its_start_and_insists_after_its_end() -> None:
    schedule = SpanSchedule(start=100, end=200, source=1000.0, final=400.0, curve="linear")
    assert not schedule.wants(99, 1000, 0)
    assert schedule.wants(150, 701, 0)
    assert not schedule.wants(150, 700, 0)
    assert schedule.wants(200, 400, 0)  # the feasible shapes say when it is over


def test_every_counts_batches() -> None:
    schedule = EverySchedule(start=0, every=2)
    events = []
    done = 0
    for batch in range(1, 7):
        while schedule.wants(batch, 1.0, done):
            done += 1
        events.append(done)
    assert events == [0, 1, 1, 2, 2, 3]
