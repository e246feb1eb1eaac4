"""Noisy latencies over a grid of widths, made never to fall when a width grows.

Where latency is a sum of products of widths, as the time of matrix products is, its few coefficients are fitted to
all measurements at once, and none of them may be negative; where it is not, each value is moved between its
neighbours. (scipy's isotonic regression orders one dimension; a grid of widths has five.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from scipy.optimize import nnls
from torch import Tensor

# Median relative residual of a good fit: below it, what is left is taken for noise. A machine with other programs on it
# left 3.3 %, and the fit was by far nearer to a later, quieter measurement (docs/results/costs.md).
GOOD_FIT = 0.05


def never_falling(values: Tensor) -> Tensor:
    """The table midway between its running maximum (from below) and its running minimum (from above), along every
    dimension at once: it never falls, and it is `values` itself where these never did."""
    most, least = values.clone(), values.clone()
    for dim in range(values.ndim):
        most = most.cummax(dim).values
        least = least.flip(dim).cummin(dim).values.flip(dim)
    return torch.where(most == least, values, (most + least) / 2)


def smoothed(grid: Sequence[Sequence[int]], values: Tensor) -> Tensor:
    """What a table of measurements says, never falling: the fit where it is good, else `never_falling`.

    grid: the widths of each dimension of `values` (positive, fp64).
    """
    fit = fitted(grid, values)
    good = float(((fit - values).abs() / values).median()) <= GOOD_FIT
    return never_falling(fit if good else values)  # a fit falls by rounding alone


def fitted(grid: Sequence[Sequence[int]], values: Tensor) -> Tensor:
    """Products of widths with coefficients of at least zero that come nearest to `values`, on the grid.

    Every set of widths is a product, the empty one a constant: between the grid's shapes such a function is what
    interpolation makes of it. Widths count from the grid's least ones, where a sum of products of whole widths is
    one too. Least squares of relative errors (Lawson and Hanson's, scipy.optimize.nnls). A dimension of one width has
    no part in it.
    """
    axes = [
        torch.tensor([(each - levels[0]) / max(1, levels[-1] - levels[0]) for each in levels], dtype=torch.float64)
        for levels in grid
    ]
    places = torch.meshgrid(*axes, indexing="ij")
    moving = [place.flatten() for place, levels in zip(places, grid, strict=True) if len(levels) > 1]
    sets = [chosen for number in range(len(moving) + 1) for chosen in combinations(moving, number)]
    ones = torch.ones(values.numel(), dtype=torch.float64)
    products_PC = torch.stack([torch.stack([ones, *chosen]).prod(0) for chosen in sets], 1)
    coefficients, _ = nnls((products_PC / values.flatten()[:, None]).numpy(), ones.numpy())
    return (products_PC @ torch.from_numpy(coefficients)).view_as(values)
