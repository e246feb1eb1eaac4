"""The second-order correction by a dense Cholesky solve in fp64: the Hessian formed and factorised."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_coefficients(inputs: Tensor, removed: Tensor, kept: Tensor, damping: float) -> Tensor:
    """B (inputs, |P|) of one layer, fp64, zero outside K. inputs (tokens, inputs), removed (|P|,), kept bool. damping:
    in mean squared norms of a token's kept inputs."""
    columns = kept.nonzero().flatten()
    x_kept, x_lost = inputs.double()[:, columns], inputs.double()[:, removed]
    hessian = x_kept.T @ x_kept
    hessian += damping * x_kept.square().sum(1).mean() * torch.eye(len(columns), dtype=torch.float64)
    solution = torch.cholesky_solve(x_kept.T @ x_lost, torch.linalg.cholesky(hessian))
    full = torch.zeros(inputs.shape[1], len(removed), dtype=torch.float64)
    full[columns] = solution
    return full
