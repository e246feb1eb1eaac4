"""The local second-order update: what is left of a layer makes up for the inputs it loses (EfficientLLM-B).

Removing the inputs P of a linear layer W (outputs x inputs) and keeping K, the correction that minimises
||X W^T - X_K W'^T||^2 over W' is

    W'_K = W_K + W_P B^T,    B = (X_K^T X_K + lambda I)^-1 X_K^T X_P

the OBS column update (SparseGPT, arXiv 2301.00774, eq. 3), exact for the whole set P at once. Only |P| right-hand
sides are needed, so B is found by conjugate gradients on the inputs themselves, v -> X_K^T (X_K v) + lambda v: no wide
Hessian is formed, and none is inverted. Deviations: SparseGPT goes column by column with an inverse Hessian; and its
lambda, a hundredth of the mean diagonal, vanishes against X^T X where tokens are many and overfits where they are few.
Here lambda is in mean squared norms of a token's inputs, whose share of X^T X falls as tokens are added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from efficientllm.pruning.readers import Reader
from efficientllm.pruning.shards import ALONE, World

EXPECTED = 12  # iterations of a solve at the default tolerance: 10 to 12 for FFNs of SmolLM2-135M
CHUNK = 1 << 27  # input elements that are solved for at once; 512 MiB in fp32


@dataclass(frozen=True)
class SolverOptions:
    """damping: lambda in mean squared norms of a token's kept inputs, E ||x_K||^2. As a share of the mean diagonal of
    X_K^T X_K that is damping |K| / tokens: a correction that has seen few tokens is a timid one. At 2, inputs of FFN,
    heads and stem of SmolLM2-135M are near their best on tokens not seen, whether 1 K, 4 K or 12 K were; a hundredth
    of the diagonal is worse than no correction for the least active FFN channels on 4 K (docs/results/correction.md).
    tolerance: residual norm over that of the right-hand side at which a column has converged; a tight one buys nothing
    on tokens not seen. iterations: most that are tried.
    """

    damping: float = 2.0
    tolerance: float = 0.1
    iterations: int = 100


@dataclass(frozen=True)
class Solution:
    """B, fp32 (layers, inputs, removed), zero outside K; whether each layer's solve converged, bool (layers,); the
    iterations that the slowest took; the operations of its matrix products, over all processes."""

    coefficients: Tensor
    converged: Tensor
    iterations: int
    flops: int


def solve_coefficients(
    inputs: Tensor, removed: Tensor, kept: Tensor, options: SolverOptions, reduction: World = ALONE
) -> Solution:
    """Jacobi-preconditioned conjugate gradients for B, all layers and right-hand sides at once.

    inputs: X, fp32 (layers, tokens, inputs). removed: int64 (layers, |P|). kept: bool (layers, inputs), K.
    A layer whose solve does not reach the tolerance, or is not finite, is marked as not converged. With several
    processes each holds tokens of its own: products with X^T are summed over them, and all solve alike.
    """
    kept_inputs = inputs * kept[:, None, :]
    lost = torch.gather(inputs, 2, removed[:, None, :].expand(-1, inputs.shape[1], -1))
    target = reduction.over_batch(kept_inputs.transpose(1, 2) @ lost)  # (layers, inputs, |P|)
    diagonal = reduction.over_batch(kept_inputs.square().sum(1))
    seen = reduction.over_batch(inputs.any(2).sum(1).to(inputs.dtype))  # without the zeros that fill up experts' tokens
    damping = options.damping * diagonal.sum(1) / seen.clamp(min=1)
    preconditioner = 1.0 / (diagonal + damping[:, None]).clamp(min=torch.finfo(inputs.dtype).tiny)

    tokens = round(float(reduction.over_batch(inputs.new_tensor(float(inputs.shape[1])))))
    together = (len(inputs), tokens, inputs.shape[2])
    forms = forms_gram(tokens, inputs.shape[2], removed.shape[1])
    gram = reduction.over_batch(kept_inputs.transpose(1, 2) @ kept_inputs) if forms else None

    def normal(vectors: Tensor) -> Tensor:
        if gram is not None:
            image = gram @ vectors
        else:
            image = reduction.over_batch(kept_inputs.transpose(1, 2) @ (kept_inputs @ vectors))
        return image + damping[:, None, None] * vectors

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
    flops = solve_flops(together, removed.shape[1], done)
    return Solution(solution * kept[:, :, None], within & finite, done, flops)


def forms_gram(tokens: int, inputs: int, removed: int) -> bool:
    """Whether X^T X, formed once, and products with it cost fewer operations than products with X and X^T do."""
    return tokens * inputs + EXPECTED * inputs * removed < 2 * EXPECTED * tokens * removed


def corrected(weight: Tensor, removed: Tensor, coefficients: Tensor) -> Tensor:
    """W with its kept columns corrected and the removed ones at zero. weight (outputs, inputs), removed (|P|,),
    coefficients B (inputs, |P|), zero outside K; returns the weight's dtype."""
    lost = weight.index_select(-1, removed)
    update = lost.to(coefficients.dtype) @ coefficients.T
    return (weight + update.to(weight.dtype)).index_fill(-1, removed, 0.0)


@dataclass
class Corrections:
    """How many linear layers were corrected, how many were left as they were for want of convergence, how many experts
    because fewer tokens had chosen them than they have inputs, and the floating-point operations of it all (matrix
    products)."""

    done: int = 0
    skipped: int = 0
    starved: int = 0
    flops: int = field(default=0, compare=False)

    def add(self, other: Corrections) -> None:
        self.done += other.done
        self.skipped += other.skipped
        self.starved += other.starved
        self.flops += other.flops


def solve_flops(shape: Sequence[int], removed: int, iterations: int) -> int:
    """Matrix products of `solve_coefficients`, for X of shape (layers, tokens, inputs) and so many right-hand sides."""
    layers, tokens, inputs = shape
    if forms_gram(tokens, inputs, removed):
        once, each = 2 * tokens * inputs**2, 2 * inputs**2 * removed
    else:
        once, each = 0, 4 * tokens * inputs * removed
    return layers * (2 * tokens * inputs * removed + once + iterations * each)


@torch.no_grad()
def correct(
    params: Mapping[str, Tensor],
    readers: Sequence[Reader],
    inputs: Mapping[str, Tensor],
    options: SolverOptions,
    reduction: World = ALONE,
) -> Corrections:
    """Corrects the readers' weights in place; one whose solve fails is left untouched, and counted.

    Rows of a weight (outputs) are corrected independently, so of a sharded one each process corrects its own.

    inputs: X of each reader by its source, (tokens, inputs); readers that share one tensor (q, k, v) share its solve. A
    reader without inputs (a fused kernel has bypassed its module) counts as skipped. Experts see the tokens that have
    chosen them; those that fewer have than the expert has inputs are left as they are. The others are filled up with
    tokens of zeros, which change no product, to be solved at once.
    """
    held = {name: inputs[name] for name in dict.fromkeys(reader.source for reader in readers) if name in inputs}
    report = Corrections(skipped=sum(reader.source not in held for reader in readers))
    held, report.starved = _filled_up(held, readers, reduction)
    sites: dict[tuple[int, tuple[int, ...]], list[Reader]] = defaultdict(list)
    for reader in readers:
        if reader.source in held:
            sites[id(held[reader.source]), tuple(reader.removed.tolist())].append(reader)
    shapes: dict[tuple[int, int, int, bool], list[list[Reader]]] = defaultdict(list)  # alike on all processes
    for site in sites.values():
        tokens, width = held[site[0].source].shape
        shapes[tokens, width, len(site[0].removed), site[0].expert is None].append(site)
    for (tokens, width, *_), same in shapes.items():
        at_once = max(1, CHUNK // (reduction.largest(tokens) * width))  # alike on all processes
        for first in range(0, len(same), at_once):
            _correct_sites(params, same[first : first + at_once], held, options, reduction, report)
    return report


def _filled_up(held: dict[str, Tensor], readers: Sequence[Reader], reduction: World) -> tuple[dict[str, Tensor], int]:
    """The inputs with those of experts all as long, and how many experts have too few over all processes."""
    experts = {each.source: each for each in readers if each.expert is not None and each.source in held}
    if not experts:
        return held, 0
    tokens = torch.tensor([len(held[name]) for name in experts], dtype=torch.float32)
    device = next(iter(held.values())).device
    totals = reduction.over_batch(tokens.to(device, copy=True)).tolist()
    starved = {name for (name, each), count in zip(experts.items(), totals, strict=True) if count < each.kept.sum()}
    longest = int(tokens.max())
    held = {name: each for name, each in held.items() if name not in starved}
    for name in experts.keys() - starved:
        held[name] = functional.pad(held[name], (0, 0, 0, longest - len(held[name])))
    return held, len(starved)


def _correct_sites(
    params: Mapping[str, Tensor],
    sites: Sequence[Sequence[Reader]],
    inputs: Mapping[str, Tensor],
    options: SolverOptions,
    reduction: World,
    report: Corrections,
) -> None:
    """Sites of equal shape, solved as one batch."""
    stacked = torch.stack([inputs[site[0].source].float() for site in sites])
    removed = torch.stack([site[0].removed for site in sites]).to(stacked.device)
    kept = torch.stack([site[0].kept for site in sites]).to(stacked.device)
    solution = solve_coefficients(stacked, removed, kept, options, reduction)
    report.flops += solution.flops
    converged = solution.converged.tolist()
    for site, indices, coefficients, good in zip(sites, removed, solution.coefficients, converged, strict=True):
        for reader in site:
            weight = reader.weight(params)
            if good:
                weight.copy_(corrected(weight, indices, coefficients))
                whole = params[reader.name]
                rows = whole.numel() if reader.expert is None else whole.numel() // whole.shape[0]
                report.flops += 2 * rows * len(indices)
        report.done += len(site) * good
        report.skipped += len(site) * (not good)
