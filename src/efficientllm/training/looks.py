"""How many rows of the batches to come pruning looks at: for a gradient, for a measured loss, for a correction."""

from __future__ import annotations

from dataclasses import dataclass

from efficientllm.pruning.groups import Space
from efficientllm.pruning.saliency import reader_specs
from efficientllm.training.state import PruningPlan

LOOK_SHARE, LOOK_TOKENS = 4, 512  # a look reads a quarter of a batch, and no fewer tokens
CORRECTION_TOKENS = 8  # for each input of the widest layer: fewer would be fitted rather than learnt from
CAPTURED = 1 << 31  # input elements that all layers together may keep of a pass


@dataclass(frozen=True)
class LookRows:
    """Rows of a batch, over all processes, that a gradient, a measured loss and captured inputs are taken from."""

    gradient: int
    measure: int
    correction: int

    @classmethod
    def of(cls, plan: PruningPlan, rows: int, length: int, processes: int = 1) -> LookRows:
        """rows, length: of a whole batch. A look has a row for every process."""

        def within(tokens: int) -> int:
            return min(rows, max(processes, -(-tokens // length)))

        calibration = plan.calibration_tokens or min(max(rows * length // 8, LOOK_TOKENS), 8192)
        correction = correction_tokens(plan.landing.space, plan.correction_tokens)
        return cls(within(max(rows * length // LOOK_SHARE, LOOK_TOKENS)), within(calibration), within(correction))


def correction_tokens(space: Space, wanted: int | None) -> int:
    """Tokens whose inputs a correction sees: as asked, or eight for each input of the widest layer."""
    if wanted is not None:
        return wanted
    widths = {(spec.layer, str(spec.axes[1])): space.shape(spec, space.widths)[1] for spec in reader_specs(space)}
    return max(1, min(CORRECTION_TOKENS * max(widths.values()), CAPTURED // sum(widths.values())))
