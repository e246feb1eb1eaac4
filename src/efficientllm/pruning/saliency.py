"""Saliency: the estimated loss increase of removing a unit, from the gradient that training has just computed.

A criterion scores every *element* of every weight; a unit's saliency is the sum over its group. Because each
weight is reduced along its axes first, one pass over the weights serves all pruning types.

Notation: L the loss, w a weight, g = dL/dw (of the mean loss over the batch), F = E[g^2] the diagonal Fisher.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientllm.pruning.groups import (
    ATTENTION,
    ATTENTION_QUERY,
    FFN,
    FFN_TYPE,
    HIDDEN,
    KV,
    QUERY,
    STEM,
    ParamSpec,
    Space,
)

ElementScore = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A named score. `element(w, g, F)` has w's shape; with `signed` the sum over the group is taken before |.|;
    `second_moment` says that it looks at F."""

    name: str
    source: str
    element: ElementScore
    signed: bool = False
    second_moment: bool = False


def taylor(weight: Tensor, grad: Tensor, _fisher: Tensor | None) -> Tensor:
    """First-order change of the loss when w goes to 0, signed: g w (LLM-Pruner, arXiv 2305.11627, eq. 3)."""
    return grad * weight


def taylor_element(weight: Tensor, grad: Tensor, _fisher: Tensor | None) -> Tensor:
    """|g w| (arXiv 2305.11627, eq. 5 without the second-order term)."""
    return (grad * weight).abs_()


def taylor_element2(weight: Tensor, grad: Tensor, fisher: Tensor | None) -> Tensor:
    """|g w - F w^2 / 2| (arXiv 2305.11627, eq. 5).

    Deviation: F is Adam's running second moment (bias-corrected, of clipped batch gradients) where there is one, not
    a mean over single samples; on the very first step, before the optimizer has one, g^2 stands in.
    """
    curvature = grad.square() if fisher is None else fisher
    return (grad - 0.5 * curvature * weight).mul_(weight).abs_()


def fisher(weight: Tensor, grad: Tensor, _fisher: Tensor | None) -> Tensor:
    """(g w)^2 (arXiv 1906.10771, eq. 8, summed over the group)."""
    return (grad * weight).square_()


def magnitude(weight: Tensor, _grad: Tensor, _fisher: Tensor | None) -> Tensor:
    """w^2 (arXiv 1608.08710 uses |w|; the square is the usual choice for groups)."""
    return weight.square()


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("taylor-element", "arXiv 2305.11627", taylor_element),
        Criterion("taylor-element2", "arXiv 2305.11627", taylor_element2, second_moment=True),
        Criterion("taylor-vector", "arXiv 2305.11627", taylor, signed=True),
        Criterion("fisher", "arXiv 1906.10771", fisher),
        Criterion("magnitude", "arXiv 1608.08710", magnitude),
    )
}


def criterion(name: str) -> Criterion:
    """The criterion of that name. Raises ValueError naming the nearest one."""
    if name in CRITERIA:
        return CRITERIA[name]
    near = difflib.get_close_matches(name, CRITERIA, n=1, cutoff=0.0)[0]
    raise ValueError(f"there is no saliency criterion '{name}'; did you mean '{near}'? (known: {', '.join(CRITERIA)})")


class AxisSums:
    """Element scores summed over everything but one axis: hidden (D,), ffn (L, F), kv (L, K*hd), query (L, H*hd).

    fp32, on the weights' device. Sums over weights are linear, so that partial sums of shards add up.
    """

    def __init__(self, space: Space, device: torch.device) -> None:
        self.space = space
        layers = space.widths.layers
        self.sums: dict[str, Tensor] = {
            axis: torch.zeros((() if axis == HIDDEN else (layers,)) + (length,), device=device)
            for axis in (HIDDEN, FFN, KV, QUERY)
            if (length := space.axis_length(axis, space.widths))
        }

    def add(self, spec: ParamSpec, scores: Tensor) -> None:
        """Adds one weight's element scores (its shape)."""
        for dim, axis in enumerate(spec.axes):
            if isinstance(axis, str):
                others = [other for other in range(scores.ndim) if other != dim]
                vector = scores.sum(others) if others else scores
                target = self.sums[axis]
                (target if axis == HIDDEN else target[spec.layer or 0]).add_(vector)

    def units(self) -> dict[str, Tensor]:
        """Scores per unit of every pruning type, fp32 (rows, units)."""
        widths, head_dim = self.space.widths, self.space.head_dim
        layers, kv_heads, queries = widths.layers, widths.kv_heads, widths.queries_per_kv
        query = self.sums[QUERY].view(layers, kv_heads, queries, head_dim).sum(-1)
        kv = self.sums[KV].view(layers, kv_heads, head_dim).sum(-1)
        return {
            ATTENTION: kv + query.sum(-1),
            ATTENTION_QUERY: query.flatten(0, 1),
            FFN_TYPE: self.sums[FFN],
            STEM: self.sums[HIDDEN][None],
        }


def unit_scores(
    space: Space,
    chosen: Criterion,
    weights: Iterable[tuple[ParamSpec, Tensor, Tensor, Tensor | None]],
    device: torch.device,
) -> dict[str, Tensor]:
    """Saliency of every unit of every type, fp32 (rows, units), from (spec, w, g, F) of each weight."""
    sums = AxisSums(space, device)
    for spec, weight, grad, second_moment in weights:
        sums.add(spec, chosen.element(weight, grad, second_moment).float())
    scores = sums.units()
    return {name: score.abs() for name, score in scores.items()} if chosen.signed else scores


class MovingAverage:
    """Exponential moving average of the unit scores, without the bias of its start (as Adam corrects it)."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def update(self, scores: dict[str, Tensor]) -> None:
        for name, score in scores.items():
            old = self.sums.get(name)
            fresh = score * (1.0 - self.decay)
            self.sums[name] = fresh if old is None else old.mul_(self.decay).add_(fresh)
        self.weight = self.decay * self.weight + (1.0 - self.decay)

    def values(self) -> dict[str, Tensor]:
        """The averages on the CPU; an empty dict before the first update."""
        return {name: (total / self.weight).cpu() for name, total in self.sums.items()}
