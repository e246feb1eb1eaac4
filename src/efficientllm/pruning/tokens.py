"""Which tokens of the source are left, and when it is asked how many are to fall next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from efficientllm.pruning.contract import TOKENS

KEPT = f"{TOKENS}kept"
RENEWED = 0.2  # share of the parameters that falls before it is asked again


@dataclass
class Tokens:
    """kept: their ids in the source, int64 in rising order; None where all are left. asked_at: parameters of the model
    when it was asked last, 0 before."""

    kept: Tensor | None = None
    asked_at: int = 0

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """As a checkpoint has them."""
        return cls(tensors.get(KEPT), facts.get("asked_at", 0))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As PruningEngine.state."""
        facts = {"asked_at": self.asked_at} if self.asked_at else {}
        return ({} if self.kept is None else {KEPT: self.kept}), facts

    def ask(self, parameters: int) -> bool:
        """Whether it is time to ask: at first, and whenever RENEWED of the parameters has fallen since."""
        if self.asked_at and parameters > (1.0 - RENEWED) * self.asked_at:
            return False
        self.asked_at = parameters
        return True
