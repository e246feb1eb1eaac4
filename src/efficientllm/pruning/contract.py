"""What the engine asks of a loop, how it is told to decide, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from efficientllm.pruning.correction import Corrections, SolverOptions
from efficientllm.pruning.decision import ByDamage, Decided, Standing
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Event
from efficientllm.pruning.ledger import Ledger

Moments = Callable[[str], Mapping[str, Tensor]]
LIVE, SCORES = "live.", "saliency."  # what the names of an engine's tensors begin with
ORIGIN, TOKENS = "origin.", "tokens."  # and of those that say which of the source's units, and tokens, are left
PREFIXES = (LIVE, SCORES, ORIGIN, TOKENS)


class Probe(Protocol):
    """What pruning may ask of the loop it lives in. Every look reads other rows than those before it, where the loop
    can: rows that training has not seen, and will still see."""

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Mapping[str, Tensor]:
        """Puts a fresh gradient at the current weights into .grad, without a weight update. Returns the inputs of the
        linear layers with these weights that it has met on the way, as `inputs` does. gates: takes in those of this
        process's rows."""
        ...

    def passes(self, use: Literal["gradient", "inputs"], batches: int) -> int:
        """How many of these read as many rows as so many batches of training have; 1 at least."""
        ...

    def gates(self) -> GateSums | None:
        """Those of this process's rows in the step's own pass, once; None where it was not watched."""
        ...

    def inputs(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Inputs (tokens, inputs) of the linear layers with these weights, at weights at most one update old.

        Layers that read one tensor share it here too.
        """
        ...

    def vocabulary(self, guide: ByDamage, at: Standing) -> int | None:
        """Asked before a bundle: how many rows of the vocabulary are to be left before anything else falls; None: it
        stays as it is. guide: says the damage on the way to some feasible shape. at: where the run is."""
        ...


@dataclass(frozen=True)
class PrunerOptions:
    """The method's dials; docs/results/ablations.md for the defaults.

    types: pruning types that may be chosen. saliency: name of the criterion, or one for each type (criteria_of).
    bound: largest share of the live parameters removed between two looks (one larger event falls alone, after a look of
    its own). correction: the second-order update of what is left; None leaves it out. order: "saliency", or a pruning
    path (selection.py) towards one fixed shape.
    look_batches: what is looked at before the first event of a step where training has taken no look (weights at rest),
    in batches of training; 0: one pass. seed: of the criterion `random`.
    """

    types: tuple[str, ...]
    saliency: str | Mapping[str, str]
    bound: float = 0.05
    correction: SolverOptions | None = None
    order: str = "saliency"
    look_batches: int = 0
    seed: int = 0


@dataclass
class PruneReport:
    """What one step() did. milestone: index of the ladder's size that was reached, if any. vocabulary: rows that are to
    be left of it, for the loop to see to; nothing else falls before. flops: of the matrix products in scores and
    solves; passes through the model are the probe's to count.

    refreshes: looks that were taken for a bundle. nonfinite: looks that were left out because they are no numbers;
    blind: all were, so that nothing fell of what was due. damages: damage per parameter of each type's next event, as
    last seen, whatever the run's cost is.
    """

    events: list[Decided[Event]] = field(default_factory=list)
    milestone: int | None = None
    vocabulary: int | None = None
    damages: dict[str, float] = field(default_factory=dict)
    refreshes: int = 0
    nonfinite: int = 0
    blind: bool = False
    corrections: Corrections = field(default_factory=Corrections)
    flops: Ledger = field(default_factory=Ledger)
