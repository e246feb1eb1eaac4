"""The second-order correction against the usual way: conjugate gradients, or forming and inverting the Hessian.

    python benchmarks/correction.py [--widths 512 1024 2048 4096 8192] [--tokens 4096] [--json OUT]

One linear layer loses one input. Both get the same inputs (low rank plus noise, as activations are) and fp32; the
usual way forms X^T X + lambda I, inverts it through its Cholesky factor and takes the OBS column update
(arXiv 2301.00774, eq. 3). The two take turns in one process; quoted are medians over repeats of the ratio of their
times, the memory that each needs beside X and W, and the layer's output error after each over that without correction,
on the tokens that the correction saw and on as many others from the same distribution.
On a GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from efficientllm.pruning.correction import SolverOptions, corrected, forms_gram, solve_coefficients

DAMPING = 0.01


def activations(tokens: int, width: int, device: str) -> Tensor:
    """(2 * tokens, width), seen and unseen: an eighth of the width in directions of falling strength, and noise."""
    tokens *= 2
    generator = torch.Generator(device).manual_seed(0)
    rank = max(8, width // 8)
    factors = torch.randn(tokens, rank, generator=generator, device=device)
    factors *= torch.arange(1, rank + 1, device=device) ** -0.5
    noise = torch.randn(tokens, width, generator=generator, device=device)
    return factors @ torch.randn(rank, width, generator=generator, device=device) + noise


def usual(inputs: Tensor, weight: Tensor, column: int) -> Tensor:
    """W after the OBS update for one column, by the inverse of the whole Hessian."""
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return weight - weight[:, column, None] * (inverse[column] / inverse[column, column])


def ours(inputs: Tensor, weight: Tensor, column: int) -> tuple[Tensor, int]:
    removed = torch.tensor([[column]], device=inputs.device)
    kept = torch.ones(1, inputs.shape[1], dtype=torch.bool, device=inputs.device)
    kept[0, column] = False
    solution = solve_coefficients(inputs[None], removed, kept, SolverOptions(DAMPING))
    assert bool(solution.converged.all())
    return corrected(weight, removed[0], solution.coefficients[0]), solution.iterations


def seconds(start: float, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(width: int, tokens: int, repeats: int, device: str) -> dict[str, float]:
    inputs, unseen = activations(tokens, width, device).split(tokens)
    weight = torch.randn(256, width, device=device)
    column, ratios, times = width // 3, [], []
    for _ in range(repeats):
        start = time.perf_counter()
        theirs = usual(inputs, weight, column)
        usual_seconds = seconds(start, device)
        start = time.perf_counter()
        mine, iterations = ours(inputs, weight, column)
        times.append(seconds(start, device))
        ratios.append(usual_seconds / times[-1])

    def error(x: Tensor, after: Tensor) -> float:
        lost = torch.outer(x[:, column], weight[:, column])
        return round(float((x @ (weight - after).T).norm() / lost.norm()), 4)

    return {
        "width": width,
        "times_faster": round(statistics.median(ratios), 1),
        "seconds": round(statistics.median(times), 4),
        "iterations": iterations,
        "error_ours": error(inputs, mine),
        "error_usual": error(inputs, theirs),
        "unseen_error_ours": error(unseen, mine),
        "unseen_error_usual": error(unseen, theirs),
        "mib_ours": round((tokens * width + (width * width if forms_gram(tokens, width, 1) else 0)) * 4 / 2**20, 1),
        "mib_usual": round(2 * width * width * 4 / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for width in arguments.widths:
        rows.append(measure(width, arguments.tokens, arguments.repeats, device))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
