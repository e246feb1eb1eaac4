"""The criteria: how much a unit seems to matter, each a pure function from its paper, chosen by name.

Notation: L the loss, w a weight, g = dL/dw (of the mean loss over the batch); X the inputs
(tokens x inputs) of a linear layer W (outputs x inputs).

Three kinds. An *element* criterion scores every weight; a unit's saliency is the sum over its group. A *column*
criterion scores every input of a linear layer that reads the unit (down_proj for FFN channels, o_proj for heads; q, k,
v, gate, up and an untied LM head for the stem); a unit's saliency is the sum over the columns that it feeds. The papers
of the latter score FFN channels and heads; the stem is our extension by the same rule. Gate Fisher scores units as such
(gates.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import EXPERT_TYPES, of_type

ElementScore = Callable[[Tensor, Tensor], Tensor]
InputStatistic = Callable[[Tensor], Tensor]
ColumnScore = Callable[[Tensor, Tensor], Tensor]
Needs = Literal["gradient", "gates", "weights", "inputs", "nothing"]

SCORED_BY = {"gradient": "element", "weights": "element", "inputs": "statistic"}  # the field of Criterion, by its needs
DAMPING = 0.01  # of the OBS Hessian, as a share of its mean diagonal (SparseGPT's own value)


@dataclass(frozen=True)
class Criterion:
    """A named score.

    needs: what it looks at beside the weights. element(w, g) has w's shape; with `signed` the sum over the group is
    taken before |.|. statistic(X) is one number an input, fp32 (inputs,),
    taken once where layers share X; column(W, statistic) one number an input of W, and without it the statistic itself
    is the score of each X. statistic_flops(tokens, inputs): of its matrix
    products. root: a unit's score is the square root of its sum. nats: a unit's score is the loss increase that its
    fall would bring, so that types compare by their scores as they are. routed: it scores experts and their channels
    alone, by the tokens that have chosen them; expert(W, X) is the score of an expert as a whole. Raises ValueError
    where the function that scores what it looks at is missing.
    """

    name: str
    needs: Needs
    source: str
    about: str
    cost: str
    element: ElementScore | None = None
    signed: bool = False
    statistic: InputStatistic | None = None
    statistic_flops: Callable[[int, int], int] = lambda tokens, inputs: 0
    column: ColumnScore | None = None
    root: bool = False
    nats: bool = False
    routed: bool = False
    expert: ColumnScore | None = None

    def __post_init__(self) -> None:
        scored_by = SCORED_BY.get(self.needs)
        if scored_by and getattr(self, scored_by) is None:
            raise ValueError(f"criterion '{self.name}' looks at {self.needs}: give it {scored_by}=, the score by it")


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """First-order change of the loss when w goes to 0, signed: g w (LLM-Pruner, arXiv 2305.11627, eq. 3).

    Deviation: without the second-order term, and |.| is taken of the whole group's sum, not of each matrix's.
    """
    return grad * weight


def taylor_element(weight: Tensor, grad: Tensor) -> Tensor:
    """|g w| (arXiv 2305.11627, eq. 5 without the second-order term)."""
    return (grad * weight).abs_()


def fisher(weight: Tensor, grad: Tensor) -> Tensor:
    """(g w)^2, the squared first-order change of the loss (arXiv 1906.10771), weight by weight."""
    return (grad * weight).square_()


def magnitude(weight: Tensor, _grad: Tensor) -> Tensor:
    """w^2 (arXiv 1608.08710 uses |w|; the square is the usual choice for groups)."""
    return weight.square()


def input_norm(inputs: Tensor) -> Tensor:
    """||X_j|| over the tokens (Wanda, arXiv 2306.11695, eq. 1)."""
    return inputs.norm(dim=0)


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """sum_i |W_ij| ||X_j|| (arXiv 2306.11695, eq. 1, summed over a column).

    Deviation: Wanda compares single weights within an output row; whole columns are compared here.
    """
    return weight.abs().sum(0) * norm


def fluctuation(inputs: Tensor) -> Tensor:
    """Sample variance of X_j over the tokens (FLAP, arXiv 2312.11983, eq. 4)."""
    return inputs.var(dim=0) if len(inputs) > 1 else torch.zeros_like(inputs[0])


def flap(weight: Tensor, variance: Tensor) -> Tensor:
    """Var(X_j) ||W_j||^2 (arXiv 2312.11983, eq. 5).

    Deviation: no bias takes the mean's place (these families have none), so what it would save is lost; scores are not
    standardised over layers.
    """
    return weight.square().sum(0) * variance


def mean_square(inputs: Tensor) -> Tensor:
    """Mean of X_j^2 over the tokens; its root over a unit is the L2 aggregate of Minitron (arXiv 2407.14679, sec. 2.2).

    Deviation: L2 over tokens for all types, where the paper tries several pairs of aggregates.
    """
    return inputs.square().mean(0)


def inverse_hessian_diagonal(inputs: Tensor) -> Tensor:
    """1 / [H^-1]_jj with H = X^T X + damping, by a Cholesky factor, in fp32; damped more where that fails. NaN
    throughout where H is not finite."""
    hessian = inputs.T @ inputs
    damping = DAMPING * hessian.diagonal().mean().clamp(min=1e-12)  # inputs may all be zero: a dead layer's are
    while bool((hessian.sum() + damping).isfinite()):
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * torch.eye(len(hessian), device=inputs.device))
        if not bool(failed):
            return 1.0 / torch.cholesky_inverse(factor).diagonal()
        damping = 10.0 * damping  # not positive definite within rounding
    return torch.full_like(hessian[0], torch.nan)


def hessian_flops(tokens: int, inputs: int) -> int:
    """X^T X, its Cholesky factor (n^3 / 3) and the inverse from it (2 n^3 / 3)."""
    return 2 * tokens * inputs**2 + inputs**3


def optimal_brain_surgeon(weight: Tensor, inverse: Tensor) -> Tensor:
    """||W_j||^2 / [H^-1]_jj: the output error of losing input j once the others have made up for it.

    SparseGPT (arXiv 2301.00774, eq. 3), for a column. Deviation: the channels of a head are summed as if they fell one
    at a time.
    """
    return weight.square().sum(0) * inverse


def mean_size(inputs: Tensor) -> Tensor:
    """Mean of |X_j| over the tokens; 0 where there are none."""
    return inputs.abs().sum(0) / max(1, len(inputs))


def reach(weight: Tensor, size: Tensor) -> Tensor:
    """||W_j|| times the mean of |X_j|: REAP's rule (below) for one channel of an expert, which is our extension."""
    return weight.norm(dim=0) * size


def routed_output(weight: Tensor, inputs: Tensor) -> Tensor:
    """Mean of g ||f(x)|| over the tokens that have chosen an expert, g the router's weight (REAP, arXiv 2510.13999).

    inputs: of the expert's last matrix, (tokens, inputs), times g: W (g a) = g f(x).
    """
    return (inputs @ weight.T).norm(dim=1).sum() / max(1, len(inputs))


DEFAULT = "gate-fisher"
FREE = "free with training"
LLM_PRUNER, PASS = "arXiv 2305.11627", "inputs of a pass at each look"
CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("taylor-element", "gradient", LLM_PRUNER, "sum |g w|", FREE, element=taylor_element),
        Criterion("taylor-vector", "gradient", LLM_PRUNER, "|sum g w|", FREE, element=taylor, signed=True),
        Criterion("fisher", "gradient", "arXiv 1906.10771", "sum (g w)^2", FREE, element=fisher),
        Criterion("gate-fisher", "gates", "arXiv 2204.09656", "mean of (x dL/dx)^2 / 2", FREE, nats=True),
        Criterion("magnitude", "weights", "arXiv 1608.08710", "sum w^2", "free", element=magnitude),
        Criterion("wanda", "inputs", "arXiv 2306.11695", "sum |W_j| ||X_j||", PASS, statistic=input_norm, column=wanda),
        Criterion("flap", "inputs", "arXiv 2312.11983", "Var(X_j) ||W_j||^2", PASS, statistic=fluctuation, column=flap),
        Criterion("activation", "inputs", "arXiv 2407.14679", "L2 of X_j", PASS, statistic=mean_square, root=True),
        Criterion(
            "sparsegpt",
            "inputs",
            "arXiv 2301.00774",
            "||W_j||^2 / [H^-1]_jj",
            PASS + ", and an inverse Hessian for each input",
            statistic=inverse_hessian_diagonal,
            statistic_flops=hessian_flops,
            column=optimal_brain_surgeon,
        ),
        Criterion(
            "reap",
            "inputs",
            "arXiv 2510.13999",
            "mean g ||f(x)|| of an expert",
            PASS,
            statistic=mean_size,
            column=reach,
            routed=True,
            expert=routed_output,
        ),
        Criterion("random", "nothing", "the control", "one draw a unit", "free"),
    )
}


def criterion(name: str) -> Criterion:
    """The criterion of that name. Raises ValueError naming the nearest one."""
    if name in CRITERIA:
        return CRITERIA[name]
    if name == "taylor-element2":
        raise ValueError(
            "saliency criterion 'taylor-element2' is gone: its second-order term was too small to change any choice; "
            "take taylor-element"
        )
    near = difflib.get_close_matches(name, CRITERIA, n=1, cutoff=0.0)[0]
    raise ValueError(f"there is no saliency criterion '{name}'; did you mean '{near}'? (known: {', '.join(CRITERIA)})")


def criteria_of(saliency: str | Mapping[str, str], types: Sequence[str]) -> dict[str, Criterion]:
    """The criterion of each of the types: one for all, or by type, where DEFAULT serves those that are not named.

    Raises ValueError for a name that is unknown, for a type that is no pruning type, and for one that its criterion
    does not score.
    """
    if isinstance(saliency, str):
        chosen = dict.fromkeys(types, criterion(saliency))
    else:
        named = {of_type(str(name)).type: criterion(str(each)) for name, each in saliency.items()}
        chosen = {name: named.get(name) or criterion(DEFAULT) for name in dict.fromkeys((*types, *named))}
    for name, each in chosen.items():
        if each.routed and name not in EXPERT_TYPES:
            raise ValueError(
                f"{each.name} scores experts and not {name}: write prune.saliency {{expert: {each.name}}}, with "
                "prune.target as widths, or prune.types [expert]"
            )
    return {name: chosen[name] for name in types}
