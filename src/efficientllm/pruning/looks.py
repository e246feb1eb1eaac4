"""Every unit's score, and when it is taken anew: looks at the gradient, the inputs or the weights, and their average.

How far a look is trusted falls with what has been removed since: once `bound` of the parameters is gone it counts
`decay` of a fresh one. Training changes the weights too, so that a look loses as much over MEMORY looks without an
event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from efficientllm.pruning.contract import Probe, PruneReport
from efficientllm.pruning.criteria import criterion
from efficientllm.pruning.groups import ParamSpec, Space
from efficientllm.pruning.saliency import (
    MovingAverage,
    all_finite,
    drawn_scores,
    input_scores,
    reader_specs,
    unit_scores,
)
from efficientllm.pruning.shards import World

MEMORY = 20
PREFIX = "saliency."  # of scores among a run's tensors


class Looks:
    """Looks at a fixed set of tensors. params, reduction: as of PruningEngine.

    fresh: a look has been taken since the last event. fallen: since then, in units of `bound`.
    """

    def __init__(
        self,
        space: Space,
        params: Mapping[str, Tensor],
        reduction: World,
        *,
        saliency: str,
        decay: float,
        seed: int,
    ) -> None:
        self._space, self._params, self._reduction = space, params, reduction
        self._decay, self._seed = decay, seed
        self._device = next(iter(params.values())).device
        self.criterion = criterion(saliency)
        self.average = MovingAverage()
        self.fallen = 0.0
        self.fresh = False
        self.nonfinite = 0  # looks left out since the last step()

    def removed(self, share: float) -> None:
        """A bundle has fallen, of so many times `bound`."""
        self.fallen += share
        self.fresh = False

    def take_gradient(self) -> None:
        """A look at the gradients now in .grad."""
        if all(weight.grad is None for weight in self._params.values()):
            raise ValueError("observe() found no gradient; call it after backward() and before zero_grad()")
        self._take(unit_scores(self._space, self.criterion, self._weights(), self._device, self._reduction))

    def before_bundle(
        self, probe: Probe, names: list[str], gathers: int, report: PruneReport
    ) -> Mapping[str, Tensor] | None:
        """Looks anew where none is fresh, `gathers` times where that needs a pass. names: linear layers whose inputs
        are wanted; returned where a look has met them."""
        needs, inputs = self.criterion.needs, None
        if needs == "weights":
            self._take(unit_scores(self._space, self.criterion, self._weights(), self._device, self._reduction))
        elif needs == "nothing" and not self.average.sums:
            drawn = drawn_scores(self._space, self._seed)
            self._take({name: score.to(self._device) for name, score in drawn.items()})
        elif needs in ("gradient", "inputs") and not self.fresh:
            look = self._gradient if needs == "gradient" else self._inputs
            for left in reversed(range(gathers)):
                inputs = look(probe, names if left == 0 else [], report)
                report.refreshes += 1
        return inputs

    def _gradient(self, probe: Probe, names: list[str], report: PruneReport) -> Mapping[str, Tensor]:
        with torch.enable_grad():
            inputs = probe.gradient(names)
        self.take_gradient()
        return inputs

    def _inputs(self, probe: Probe, names: list[str], report: PruneReport) -> Mapping[str, Tensor]:
        readers = reader_specs(self._space)
        inputs = probe.inputs([spec.name for spec in readers])  # of which `names` are some
        chosen, reduction = self.criterion, self._reduction
        self._take(input_scores(self._space, chosen, readers, self._params, inputs, self._device, reduction))
        distinct = {id(inputs[spec.name]): inputs[spec.name] for spec in readers}.values()
        # Processes may hold other numbers of rows, so that theirs are added up.
        own = torch.tensor(len(next(iter(distinct))), device=self._device)
        tokens = int(reduction.over_batch(own))
        report.flops.looks += sum(chosen.statistic_flops(tokens, each.shape[1]) for each in distinct)
        return inputs

    def _take(self, scores: Mapping[str, Tensor]) -> None:
        if not all_finite(scores):  # in the average it would stay for good
            self.nonfinite += 1
            return
        self.average.update(scores, self._decay ** max(self.fallen, 1.0 / MEMORY))
        self.fallen, self.fresh = 0.0, True

    def _weights(self) -> Iterator[tuple[ParamSpec, Tensor, Tensor]]:
        """(spec, w, g) of every weight, without those that want a gradient.

        Sharded weights come as they are; whoever reads them takes the local part.
        """
        for spec in self._space.params:
            weight = self._params[spec.name]
            gradient = weight.grad if self.criterion.needs == "gradient" else weight
            if gradient is not None:
                yield spec, weight.detach(), gradient

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As PruningEngine.state."""
        average = self.average
        tensors = {f"{PREFIX}{name}": total for name, total in average.sums.items()}
        return tensors, {"saliency_weight": average.weight, "saliency_scale": average.scale, "fallen": self.fallen}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
        """As PruningEngine.load_state. False where an earlier version has left scores in another unit: the next look
        takes them anew, and what was measured against them is worth nothing."""
        if "saliency_scale" not in facts:
            return False
        self.average.weight, self.average.scale = facts["saliency_weight"], facts["saliency_scale"]
        self.fallen = facts["fallen"]
        self.average.sums = {
            name.removeprefix(PREFIX): total.to(self._device, copy=True)
            for name, total in tensors.items()
            if name.startswith(PREFIX)
        }
        return True
