"""Tables that never fall: what was monotone is left alone, noise is fitted away, what is no product is not."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientllm.models.latency_fit import fitted, never_falling, smoothed

GRID = ((4,), (16, 56, 96), (1, 3, 6), (1,), (8, 150, 288))


def latency(noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Seconds over GRID of a constant, hidden * FFN, hidden * heads and heads; noise: sigma of a relative error."""
    draw = random.Random(seed)
    values = [
        (3e-2 + 2e-6 * hidden * ffn + 3e-5 * hidden * kv + 1e-3 * kv) * (1 + draw.gauss(0, noise))
        for hidden in GRID[1]
        for kv in GRID[2]
        for ffn in GRID[4]
    ]
    return torch.tensor(values, dtype=torch.float64).view([len(levels) for levels in GRID])


def rises(values: torch.Tensor) -> bool:
    return all(bool((values.diff(dim=dim) >= 0).all()) for dim in range(values.ndim))


def test_what_never_fell_is_left_as_it_was() -> None:
    rising = torch.tensor([[1.0, 2.0], [1.5, 2.25]], dtype=torch.float64)
    assert torch.equal(never_falling(rising), rising)
    noisy = never_falling(torch.tensor([[1.0, 3.0], [2.0, 2.5]], dtype=torch.float64))
    assert noisy.tolist() == [[1.0, 2.75], [2.0, 2.75]]


def test_a_sum_of_products_is_found_exactly() -> None:
    assert torch.allclose(fitted(GRID, latency()), latency(), rtol=1e-9)


def test_noise_is_fitted_away_and_leaves_no_step_without_a_price() -> None:
    """2 % of noise makes a wider shape faster and leaves a step that saves nothing; the fit is nearer to the truth."""
    noisy, truth = latency(0.02, seed=2), latency()
    assert not rises(noisy)
    found = smoothed(GRID, noisy)
    assert rises(found)
    slopes = [found.diff(dim=dim) / truth.diff(dim=dim) for dim in (1, 2, 4)]
    assert all(bool((each > 0.5).all() and (each < 1.5).all()) for each in slopes)
    midway = never_falling(noisy)
    assert min(float(midway.diff(dim=dim).min()) for dim in (1, 2, 4)) == 0.0
    assert float((found / truth - 1).abs().mean()) < 0.7 * float((midway / truth - 1).abs().mean())


def test_what_is_no_sum_of_products_is_not_fitted() -> None:
    """A staircase, as of a GPU that computes in tiles: the measurements stay."""
    steps = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, 3, 1, 3)
    assert torch.equal(smoothed(GRID, steps), steps)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.5))
def test_the_fit_is_the_nearest_without_a_negative_coefficient(seed: int, noise: float) -> None:
    """Relative residuals of the best fit have no product along which they could still shrink."""
    draw = random.Random(seed)
    values = latency().apply_(lambda value: value * (1 + noise * draw.random()))
    residual = ((values - fitted(GRID, values)) / values).flatten()
    moving = [dim for dim, levels in enumerate(GRID) if len(levels) > 1]
    for chosen in (some for number in range(4) for some in combinations(moving, number)):
        product = torch.ones_like(values)
        for dim in chosen:
            levels = torch.tensor(GRID[dim], dtype=torch.float64)
            shape = [-1 if each == dim else 1 for each in range(values.ndim)]
            product = product * ((levels - levels[0]) / (levels[-1] - levels[0])).view(shape)
        assert float((product / values).flatten() @ residual) < 1e-6 * float((product / values).norm())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.5))
def test_smoothed_never_falls(seed: int, noise: float) -> None:
    draw = random.Random(seed)
    values = latency().apply_(lambda value: value * (1 + noise * draw.random()))
    assert rises(smoothed(GRID, values))


def test_a_fit_of_two_levels_a_width_goes_through_every_point() -> None:
    grid = ((4,), (8, 16), (1, 2), (1,), (8,))
    values = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64).view(1, 2, 2, 1, 1)
    assert torch.allclose(fitted(grid, values), values, rtol=1e-9)
    assert [a < b for a, b in pairwise(fitted(grid, values).flatten().tolist())] == [True] * 3
    assert fitted(((4,),) * 5, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)).item() == pytest.approx(1.0)
