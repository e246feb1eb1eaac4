"""What the engine asks of a loop, how it is told to decide, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from efficientllm.pruning.correction import Corrections, SolverOptions
from efficientllm.pruning.groups import Event, Widths

Moments = Callable[[str], Mapping[str, Tensor]]


class Probe(Protocol):
    """What pruning may ask of the loop it lives in, about the current batch."""

    def loss(self) -> float:
        """Mean loss in nats on one fixed micro-batch of the current batch; no gradient."""
        ...

    def refresh(self) -> None:
        """Puts the gradient of the current batch at the current weights into .grad; no weight update."""
        ...

    def inputs(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Inputs (tokens, inputs) of the linear layers with these weights, on tokens of the current batch.

        Layers that read one tensor share it here too.
        """
        ...


@dataclass(frozen=True)
class PrunerOptions:
    """The method's dials; docs/results/ablations.md for the defaults.

    types: pruning types that may be chosen. saliency: name of the criterion. decay: of its moving average.
    calibrated: compare types by measured loss, not by raw scores. bound: largest share of the live parameters
    removed between two refreshes of saliency and calibration (one event is always allowed). correction: the
    second-order update of what is left; None leaves it out. order: "saliency", or a pruning path (selection.py)
    towards one fixed shape. gathers: scores are averaged over all steps before the first event too, where they
    do not come from the gradient (one-shot). seed: of the criterion `random`.
    """

    types: tuple[str, ...]
    saliency: str = "taylor-element"
    decay: float = 0.9
    calibrated: bool = True
    bound: float = 0.01
    correction: SolverOptions | None = None
    order: str = "saliency"
    gathers: bool = False
    seed: int = 0


@dataclass(frozen=True)
class AppliedEvent:
    """An event that has happened, and the model it left behind. removed: parameters that fell with it. saved: what
    it took from the run's cost; of a measured one this may be less than the event's price."""

    event: Event
    parameters: int
    widths: Widths
    removed: int
    saved: float


@dataclass
class PruneReport:
    """What one step() did. rung: index of the ladder's size that was reached, where one was. flops: of the matrix
    products in scores and corrections; passes through the model are the probe's to count.

    nonfinite: gradients and measured losses that were left out because they are no numbers.

    damages: calibrated damage per parameter of each type's next event, as last seen, whatever the run's cost is.
    """

    events: list[AppliedEvent] = field(default_factory=list)
    rung: int | None = None
    damages: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    refreshes: int = 0
    calibrations: int = 0
    nonfinite: int = 0
    corrections: Corrections = field(default_factory=Corrections)
    flops: int = 0
