"""The matrix-free solve against the dense one, and what a correction must never do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientllm.pruning import correction
from efficientllm.pruning.correction import SolverOptions, corrected, solve_coefficients
from reference.correction_fp64 import dense_coefficients

PRECISE = SolverOptions(damping=0.05, tolerance=1e-5, iterations=400)


def problem(seed: int, layers: int, tokens: int, inputs: int, lost: int) -> tuple[torch.Tensor, ...]:
    """Correlated inputs, removed columns, kept columns (one of the others dead already)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layers, inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(layers, tokens, inputs, generator=generator) @ mixing
    order = torch.stack([torch.randperm(inputs, generator=generator) for _ in range(layers)])
    removed = order[:, :lost].sort(1).values
    kept = torch.ones(layers, inputs, dtype=torch.bool).scatter_(1, order[:, : lost + 1], False)
    return x, removed, kept


def errors(x: torch.Tensor, weight: torch.Tensor, removed: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Output error of one layer with the columns zeroed: corrected, and not."""
    output = x @ weight.T
    plain = weight.index_fill(1, removed, 0.0)
    return float((output - x @ corrected(weight, removed, b).T).norm()), float((output - x @ plain.T).norm())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(4, 40), st.integers(1, 3))
def test_equals_the_dense_solution_and_never_hurts(seed: int, layers: int, inputs: int, lost: int) -> None:
    x, removed, kept = problem(seed, layers, 120, inputs + lost + 1, lost)
    solution = solve_coefficients(x, removed, kept, PRECISE)
    assert solution.converged.all()
    for layer in range(layers):
        want = dense_coefficients(x[layer], removed[layer], kept[layer], PRECISE.damping)
        torch.testing.assert_close(solution.coefficients[layer].double(), want, rtol=1e-3, atol=1e-3)
        weight = torch.randn(7, x.shape[2], generator=torch.Generator().manual_seed(seed))
        after, before = errors(x[layer], weight, removed[layer], solution.coefficients[layer])
        assert after <= before * (1 + 1e-5)


def test_losing_a_copied_channel_is_lossless() -> None:
    x, removed, kept = problem(0, 1, 200, 20, 1)
    twin = int(kept[0].nonzero()[0])
    x[0, :, removed[0, 0]] = x[0, :, twin]
    solution = solve_coefficients(x, removed, kept, SolverOptions(damping=1e-6, tolerance=1e-6, iterations=400))
    weight = torch.randn(5, 20)
    after, before = errors(x[0], weight, removed[0], solution.coefficients[0])
    assert after < 1e-3 * before


def test_rank_deficient_inputs_do_no_harm() -> None:
    """Fewer tokens than inputs, and columns that are zero throughout."""
    x, removed, kept = problem(1, 2, 6, 30, 2)
    x[:, :, 10:20] = 0.0
    solution = solve_coefficients(x, removed, kept, PRECISE)
    assert solution.coefficients.isfinite().all()
    for layer in range(2):
        after, before = errors(x[layer], torch.randn(5, 30), removed[layer], solution.coefficients[layer])
        assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize("tokens", [40, 100, 400])
def test_few_tokens_are_not_overfitted(tokens: int) -> None:
    """On tokens not seen, of 96 inputs in 12 directions with as much noise: a tenth above the best damping at most."""
    generator = torch.Generator().manual_seed(tokens)
    directions = torch.randn(12, 96, generator=generator) / 12**0.5
    parts = (torch.randn(tokens + 2000, n, generator=generator) for n in (12, 96))
    x = next(parts) @ directions + next(parts)
    removed, kept = torch.tensor([[1, 5, 80]]), torch.ones(1, 96, dtype=torch.bool)
    kept[0, removed[0]] = False
    weight = torch.randn(50, 96, generator=generator)

    def unseen(options: SolverOptions) -> float:
        solution = solve_coefficients(x[None, :tokens], removed, kept, options)
        after, before = errors(x[tokens:], weight, removed[0], solution.coefficients[0])
        return after / before

    best = min(unseen(SolverOptions(damping=2.0**power)) for power in range(-6, 8))
    assert unseen(SolverOptions()) < min(1.0, 1.1 * best)


def test_tokens_of_zeros_change_nothing() -> None:
    """Experts' tokens are filled up with them."""
    x, removed, kept = problem(5, 2, 60, 14, 2)
    filled = torch.cat([x, torch.zeros(2, 40, x.shape[2])], dim=1)
    want, got = (solve_coefficients(each, removed, kept, PRECISE) for each in (x, filled))
    torch.testing.assert_close(got.coefficients, want.coefficients, rtol=1e-4, atol=1e-5)


def test_a_solve_that_fails_says_so() -> None:
    x, removed, kept = problem(2, 2, 100, 30, 1)
    assert not solve_coefficients(x, removed, kept, SolverOptions(damping=1e-8, iterations=1)).converged.any()
    x[1, 0, 0] = torch.inf
    solution = solve_coefficients(x, removed, kept, PRECISE)
    assert not solution.converged[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_keeps_its_type_and_loses_its_columns(dtype: torch.dtype) -> None:
    x, removed, kept = problem(3, 1, 80, 12, 2)
    solution = solve_coefficients(x, removed, kept, PRECISE)
    weight = torch.randn(4, 12).to(dtype)
    after = corrected(weight, removed[0], solution.coefficients[0])
    assert after.dtype == dtype
    assert not after[:, removed[0]].any()
    untouched = ~kept[0]
    untouched[removed[0]] = False
    assert torch.equal(after[:, untouched], weight[:, untouched])


def test_with_and_without_a_formed_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    x, removed, kept = problem(4, 2, 150, 33, 2)
    monkeypatch.setattr(correction, "forms_gram", lambda *_: True)
    formed = solve_coefficients(x, removed, kept, PRECISE)
    monkeypatch.setattr(correction, "forms_gram", lambda *_: False)
    free = solve_coefficients(x, removed, kept, PRECISE)
    torch.testing.assert_close(free.coefficients, formed.coefficients, rtol=1e-3, atol=1e-4)
