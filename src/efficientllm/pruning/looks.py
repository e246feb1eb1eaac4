"""Every unit's score, and when it is taken anew: looks at the gradient, the inputs or the weights, and their average.

How far a look is trusted falls with what has been removed since: once `bound` of the parameters is gone it counts
DECAY of a fresh one. Training changes the weights too, so that a look loses as much over MEMORY looks without an
event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from efficientllm.pruning.contract import SCORES, Probe, PruneReport
from efficientllm.pruning.criteria import Criterion
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import ParamSpec, Space
from efficientllm.pruning.live import part_of
from efficientllm.pruning.readers import input_scores, reader_specs
from efficientllm.pruning.saliency import MovingAverage, drawn_scores, unit_scores
from efficientllm.pruning.shards import World

DECAY = 0.5
MEMORY = 20


def scores_are_known(facts: Mapping[str, Any]) -> bool:
    """Of an engine's saved facts. Those of an earlier version are in another unit: the next look takes scores anew."""
    return isinstance(facts.get("saliency_scale"), Mapping)


class Looks:
    """Looks at a fixed set of tensors, at every type by its own criterion. params, reduction: as of PruningEngine.

    needs: what the criteria look at (Criterion.needs). fallen: what has fallen since the last look at each of these, in
    units of `bound`.
    """

    def __init__(
        self,
        space: Space,
        params: Mapping[str, Tensor],
        reduction: World,
        *,
        criteria: Mapping[str, Criterion],
        seed: int,
    ) -> None:
        self._space, self._params, self._reduction = space, params, reduction
        self._criteria, self._seed = criteria, seed
        self._device = next(iter(params.values())).device
        self.needs = frozenset(each.needs for each in criteria.values())
        self.average = MovingAverage()
        self.fallen: dict[str, float] = dict.fromkeys(sorted(self.needs), 0.0)
        self._fresh: set[str] = set()  # needs of which a look has been taken since the last event
        self.nonfinite = 0  # looks left out since the last step()

    @property
    def complete(self) -> bool:
        """Whether every type has scores."""
        return self.average.sums.keys() >= self._criteria.keys()

    def removed(self, share: float) -> None:
        """A bundle has fallen, of so many times `bound`."""
        self.fallen = {need: fallen + share for need, fallen in self.fallen.items()}
        self._fresh.clear()

    def begin(self) -> None:
        """The weights have been updated: what was seen on the way of a pass before is no fresh look any more, while the
        gradients of that pass are, as training itself goes by them."""
        self._fresh &= {"gradient"}

    def observe(self) -> None:
        """A look at the gradients now in .grad, where a criterion wants them."""
        if self.needs & {"gradient", "gates"} and all(weight.grad is None for weight in self._params.values()):
            raise ValueError("observe() found no gradient; call it after backward() and before zero_grad()")
        if "gradient" in self.needs:
            self._take("gradient")

    def before_bundle(
        self, probe: Probe, names: list[str], batches: int, report: PruneReport
    ) -> Mapping[str, Tensor] | None:
        """Looks anew at whatever has not been looked at since the last event; by passes, where it needs them, over as
        many rows as so many batches have. names: linear layers whose inputs are wanted; returned where a look has met
        them."""
        inputs: Mapping[str, Tensor] | None = None
        if "weights" in self.needs:
            self._take("weights")
        if "nothing" in self.needs and not self.complete:
            self._take("nothing")
        if "gates" in self.needs and "gates" not in self._fresh:
            own = probe.gates()
            if own is not None:
                self._take("gates", gates=own)
        stale = self.needs - self._fresh
        if stale & {"gradient", "gates"}:
            for left in reversed(range(probe.passes("gradient", batches))):
                gates = GateSums(self._space, self._device) if "gates" in self.needs else None
                with torch.enable_grad():
                    inputs = probe.gradient(names if left == 0 else [], gates)
                self.observe()
                if gates is not None:
                    self._take("gates", gates=gates)
                report.refreshes += 1
        if "inputs" in stale:
            readers = [spec.name for spec in reader_specs(self._space)]
            met = inputs is not None and inputs.keys() >= set(readers)
            for _ in range(1 if met else probe.passes("inputs", batches)):
                inputs = inputs if met else probe.inputs(readers)
                assert inputs is not None
                self._take("inputs", inputs=inputs)
                report.flops.looks += self._statistic_flops(inputs)
                report.refreshes += not met
        return inputs

    def _take(self, need: str, *, gates: GateSums | None = None, inputs: Mapping[str, Tensor] | None = None) -> None:
        """Scores of the types whose criteria need this, into their average."""
        found: dict[str, Tensor] = {}
        for chosen in {each.name: each for each in self._criteria.values() if each.needs == need}.values():
            scores = self._scores(chosen, gates, inputs)
            found |= {name: scores[name] for name, each in self._criteria.items() if each.name == chosen.name}
        units = torch.cat([score.flatten() for score in found.values()])
        if not units.isfinite().all():  # in the average it would stay for good
            self.nonfinite += 1
            return
        self.average.update(found, DECAY ** max(self.fallen[need], 1.0 / MEMORY))
        self.fallen[need] = 0.0
        self._fresh.add(need)

    def _scores(
        self, chosen: Criterion, gates: GateSums | None, inputs: Mapping[str, Tensor] | None
    ) -> Mapping[str, Tensor]:
        """Of every unit of every type, fp32 (rows, units)."""
        if gates is not None:
            return gates.scores(self._reduction)
        if inputs is not None:
            readers = reader_specs(self._space)
            return input_scores(self._space, chosen, readers, self._params, inputs, self._device, self._reduction)
        if chosen.needs == "nothing":
            return {name: score.to(self._device) for name, score in drawn_scores(self._space, self._seed).items()}
        return unit_scores(self._space, chosen, self._weights(chosen), self._device, self._reduction)

    def _statistic_flops(self, inputs: Mapping[str, Tensor]) -> float:
        """Of the matrix products in the criteria that look at inputs, over all processes."""
        specs = reader_specs(self._space)
        shared = {id(each): each for each in [inputs[spec.name] for spec in specs if not spec.is_apart(-1)]}
        widths = [each.shape[1] for each in shared.values()]
        for spec in specs:
            if spec.is_apart(-1):  # each expert's own
                widths += [self._params[spec.name].shape[-1]] * self._params[spec.name].shape[0]
        # Processes may hold other numbers of rows, so that theirs are added up.
        first = next(iter(shared.values()))
        tokens = int(self._reduction.over_batch(torch.tensor(len(first), device=self._device)))
        chosen = {each.name: each for each in self._criteria.values() if each.needs == "inputs"}.values()
        return sum(criterion.statistic_flops(tokens, width) for criterion in chosen for width in widths)

    def _weights(self, chosen: Criterion) -> Iterator[tuple[ParamSpec, Tensor, Tensor]]:
        """(spec, w, g) of every weight but those that lack the gradient which the criterion needs.

        Sharded weights come as they are; whoever reads them takes the local part.
        """
        for spec in self._space.params:
            weight = self._params[spec.name]
            gradient = weight.grad if chosen.needs == "gradient" else weight
            if gradient is not None:
                yield spec, weight.detach(), gradient

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As PruningEngine.state."""
        average = self.average
        tensors = {f"{SCORES}{name}": total for name, total in average.sums.items()}
        facts = {"saliency_weight": average.weight, "saliency_scale": average.scale, "fallen": self.fallen}
        return tensors, {name: dict(each) for name, each in facts.items()}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """As PruningEngine.load_state, of scores that are known."""
        self.average.weight, self.average.scale = dict(facts["saliency_weight"]), dict(facts["saliency_scale"])
        self.fallen = dict(facts["fallen"])
        sums = part_of(tensors, SCORES)
        self.average.sums = {name: total.to(self._device, copy=True) for name, total in sums.items()}
