"""The local second-order update: what is left of a layer makes up for the inputs it loses (EfficientLLM-B).

Removing the inputs P of a linear layer W (outputs x inputs) and keeping K, the correction that minimises
||X W^T - X_K W'^T||^2 over W' is

    W'_K = W_K + W_P B^T,    B = (X_K^T X_K + lambda I)^-1 X_K^T X_P

the OBS column update (SparseGPT, arXiv 2301.00774, eq. 3), exact for the whole set P at once. Only |P| right-hand
sides are needed, so B is found by conjugate gradients on the inputs themselves, v -> X_K^T (X_K v) + lambda v: no
Hessian is formed, let alone inverted. Deviation: SparseGPT goes column by column with an inverse Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SolverOptions:
    """damping: lambda as a share of the mean diagonal of X_K^T X_K. tolerance: residual norm over that of the
    right-hand side at which a column has converged; iterations: most that are tried."""

    damping: float = 0.01
    tolerance: float = 1e-3
    iterations: int = 60


@dataclass(frozen=True)
class Solution:
    """B, fp32 (layers, inputs, removed), zero outside K; whether each layer's solve converged, bool (layers,)."""

    coefficients: Tensor
    converged: Tensor
    iterations: int


def solve_coefficients(inputs: Tensor, removed: Tensor, kept: Tensor, options: SolverOptions) -> Solution:
    """Jacobi-preconditioned conjugate gradients for B, all layers and right-hand sides at once.

    inputs: X, fp32 (layers, tokens, inputs). removed: int64 (layers, |P|). kept: bool (layers, inputs), K.
    A layer whose solve does not reach the tolerance, or is not finite, is marked as not converged.
    """
    kept_inputs = inputs * kept[:, None, :]
    lost = torch.gather(inputs, 2, removed[:, None, :].expand(-1, inputs.shape[1], -1))
    target = kept_inputs.transpose(1, 2) @ lost  # (layers, inputs, |P|)
    diagonal = kept_inputs.square().sum(1)
    damping = options.damping * diagonal.sum(1) / kept.sum(1).clamp(min=1)
    preconditioner = 1.0 / (diagonal + damping[:, None]).clamp(min=torch.finfo(inputs.dtype).tiny)

    def normal(vectors: Tensor) -> Tensor:
        return kept_inputs.transpose(1, 2) @ (kept_inputs @ vectors) + damping[:, None, None] * vectors

    solution = torch.zeros_like(target)
    residual = target
    direction = scaled = residual * preconditioner[:, :, None]
    product = (residual * scaled).sum(1, keepdim=True)
    goal = options.tolerance * target.norm(dim=1)
    done = 0
    while done < options.iterations and bool((residual.norm(dim=1) > goal).any()):
        image = normal(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, product / curvature, 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        scaled = residual * preconditioner[:, :, None]
        following = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(product > 0, following / product, 0.0) * direction
        product = following
        done += 1
    within = (residual.norm(dim=1) <= goal).all(1)
    finite = solution.isfinite().flatten(1).all(1)
    return Solution(solution * kept[:, :, None], within & finite, done)


def corrected(weight: Tensor, removed: Tensor, coefficients: Tensor) -> Tensor:
    """W with its kept columns corrected and the removed ones at zero. weight (outputs, inputs), removed (|P|,),
    coefficients B (inputs, |P|), zero outside K; returns the weight's dtype."""
    lost = weight.index_select(1, removed)
    update = lost.to(coefficients.dtype) @ coefficients.T
    return (weight + update.to(weight.dtype)).index_fill(1, removed, 0.0)
