"""How far each type's scores are off: bundles of units are zeroed, the loss is measured, every bit is put back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from efficientllm.pruning.contract import Probe
from efficientllm.pruning.groups import Cut, Slice, Space
from efficientllm.pruning.shards import local, local_indices
from efficientllm.pruning.slices import group_slices

CALIBRATION_SHARE = 0.01  # of the live parameters, in the bundles whose true cost is measured
# A type that seems to cost nothing is noise; it may look this much cheaper than predicted, no more.
LEAST_RATIO = 1e-3


@dataclass(frozen=True)
class Bundle:
    """The next events of one type, large enough to stand above numerical noise. predicted: their saliency, in nats."""

    type: str
    cuts: list[Cut]
    predicted: float


@dataclass
class Calibration:
    """Measured over predicted loss increase of each type, smoothed over the measurements.

    Both sums are averaged before they are divided: a ratio of averages stands noise that an average of ratios
    does not. They share their weights, so the ratio needs no correction for their start at zero. At 0.8 about five
    bundles of 1 % of the parameters speak: one, measured on a few hundred tokens, is often no more than noise.
    """

    smoothing: float = 0.8
    measured: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)

    def update(self, pruning_type: str, measured: float, predicted: float) -> None:
        """One measurement in nats: the loss increase of a zeroed bundle, and the sum of its saliency. Both finite: what
        is not would stay in the averages for good."""
        assert math.isfinite(measured)
        assert math.isfinite(predicted)
        for record, value in ((self.measured, measured), (self.predicted, predicted)):
            old = record.get(pruning_type, 0.0)
            record[pruning_type] = self.smoothing * old + (1.0 - self.smoothing) * value

    def ratio(self, pruning_type: str) -> float:
        """Factor that turns predicted into measured loss increase; 1 before the first measurement."""
        predicted = self.predicted.get(pruning_type, 0.0)
        if predicted <= 0.0:
            return 1.0
        return max(self.measured[pruning_type] / predicted, LEAST_RATIO)


@torch.no_grad()
def measure(
    calibration: Calibration, bundles: Sequence[Bundle], space: Space, params: Mapping[str, Tensor], probe: Probe
) -> int:
    """Measures what zeroing each bundle does to the loss, and puts every bit back.

    All measurements share one micro-batch, so that their differences are paired. Those that are not finite are left
    out; returns their number.
    """
    unpruned, left_out = probe.loss(), 0
    for bundle in bundles:
        saved = _cut_out(bundle.cuts, space, params)
        increase = probe.loss() - unpruned
        for part, values in saved:
            local(params[part.name]).index_copy_(part.dim, part.indices, values)
        if math.isfinite(increase) and math.isfinite(bundle.predicted):
            calibration.update(bundle.type, increase, bundle.predicted)
        else:
            left_out += 1
    return left_out


def _cut_out(cuts: Sequence[Cut], space: Space, params: Mapping[str, Tensor]) -> list[tuple[Slice, Tensor]]:
    """Zeroes the weights (not the moments) of the cuts' groups; returns what was there, with indices into the local
    parts."""
    saved = []
    for part in group_slices(space, cuts):
        weight = params[part.name]
        part = Slice(part.name, part.dim, local_indices(weight, part.dim, part.indices))
        saved.append((part, local(weight).index_select(part.dim, part.indices)))
    for part, _ in saved:
        local(params[part.name]).index_fill_(part.dim, part.indices, 0.0)
    return saved
