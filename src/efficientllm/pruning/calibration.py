"""How far each type's scores are off: bundles fall as they would, the loss is measured, every bit is put back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from efficientllm.pruning.groups import Removal, Space
from efficientllm.pruning.shards import local, local_place
from efficientllm.pruning.slices import group_slices
from efficientllm.pruning.widths import Widths

CALIBRATION_SHARE = 0.01  # of the live parameters, in the bundles whose true cost is measured
# A type that seems to cost nothing is noise; it may look this much cheaper than predicted, no more.
LEAST_RATIO = 1e-3
SETTLED = 0.25  # a ratio that its last measurement has moved by no more is not measured again ...
RENEWED = 0.2  # ... before this share of the parameters has fallen


def trial_events(space: Space, pruning_type: str, widths: Widths, *, least: int, bound: float) -> int:
    """Events of a type that calibration measures: about 1 % of the live parameters (at most `bound`), one at least, and
    none below `least` units a row."""
    share = min(bound, CALIBRATION_SHARE) * space.num_params(widths)
    return min(widths.count(pruning_type) - least, max(1, round(share / space.event_cost(pruning_type, widths))))


@dataclass(frozen=True)
class Bundle:
    """The next events of one type, large enough to stand above numerical noise. predicted: their saliency, in nats."""

    type: str
    removals: list[Removal]
    predicted: float


@dataclass
class Calibration:
    """Measured over predicted loss increase of each type, smoothed over the measurements.

    Both sums are averaged before they are divided: a ratio of averages stands noise that an average of ratios
    does not. They share their weights, so the ratio needs no correction for their start at zero.

    units: what predictions of a type are counted in, the looks' own (MovingAverage.units). It changes with the size of
    the looks; predictions are kept as shares of it. moved: by what share of itself the last measurement has moved a
    type's ratio; parameters: of the model at that measurement.
    """

    smoothing: float = 0.5
    units: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)

    def update(self, pruning_type: str, measured: float, predicted: float, parameters: float = 0.0) -> None:
        """One measurement in nats: the loss increase of a bundle, and the sum of its saliency. Both finite: what is not
        would stay in the averages for good."""
        assert math.isfinite(measured)
        assert math.isfinite(predicted)
        known, before = pruning_type in self.predicted, self.ratio(pruning_type)
        for record, value in (
            (self.measured, measured),
            (self.predicted, predicted / self.units.get(pruning_type, 1.0)),
        ):
            old = record.get(pruning_type, 0.0)
            record[pruning_type] = self.smoothing * old + (1.0 - self.smoothing) * value
        after = self.ratio(pruning_type)
        if known:
            self.moved[pruning_type] = abs(after - before) / max(after, before)
        self.parameters[pruning_type] = parameters

    def ratio(self, pruning_type: str) -> float:
        """Factor that turns predicted into measured loss increase; 1 before the first measurement."""
        predicted = self.predicted.get(pruning_type, 0.0) * self.units.get(pruning_type, 1.0)
        if predicted <= 0.0:
            return 1.0
        return max(self.measured[pruning_type] / predicted, LEAST_RATIO)

    def due(self, pruning_type: str, parameters: float, bound: float) -> bool:
        """Whether a type is to be measured (again) on a model of so many parameters: it has not been, or half of
        `bound` has fallen since and its ratio is not settled, or RENEWED has fallen since."""
        if pruning_type not in self.parameters:
            return True
        fallen = 1.0 - parameters / self.parameters[pruning_type]
        return fallen >= RENEWED or (fallen >= bound / 2 and self.moved.get(pruning_type, math.inf) > SETTLED)


@contextmanager
def trial(
    space: Space, params: Mapping[str, Tensor], removals: Sequence[Removal], corrected: Sequence[str] = ()
) -> Iterator[None]:
    """Every bit that the body changes is put back: of the groups that fall, and of the weights that it corrects, copies
    of which wait on the CPU."""
    whole = {name: local(params[name]).to("cpu", copy=True) for name in corrected}
    parts = []
    for part in group_slices(space, removals):
        if part.name not in whole:
            place = local_place(params[part.name], part.dim, part.indices, part.rows)
            parts.append((part.name, place, local(params[part.name])[place]))
    try:
        yield
    finally:
        for name, place, values in parts:
            local(params[name])[place] = values
        for name, copy in whole.items():
            local(params[name]).copy_(copy)
