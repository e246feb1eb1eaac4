"""The method in two calls, for any training loop: observe() after the backward pass, step() after the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from efficientllm.pruning.calibration import Calibration, measure
from efficientllm.pruning.contract import AppliedEvent, Moments, Probe, PruneReport, PrunerOptions, SecondMoment
from efficientllm.pruning.correction import Corrections, correct, losing_readers
from efficientllm.pruning.criteria import criterion
from efficientllm.pruning.groups import ATTENTION_QUERY, DEPTH, Cut, Event, Live, ParamSpec, Slice, Space, Widths
from efficientllm.pruning.landing import Landing
from efficientllm.pruning.saliency import (
    MovingAverage,
    all_finite,
    drawn_scores,
    input_scores,
    reader_specs,
    unit_scores,
)
from efficientllm.pruning.schedule import Schedule
from efficientllm.pruning.selection import Candidate, Ranking, candidates, least_damage, next_bundles, next_on_path
from efficientllm.pruning.shards import Alone, Reduction, fill
from efficientllm.pruning.slices import dead_slices, group_slices


class PruningEngine:
    """Decides and carries out pruning events on a fixed set of tensors.

    params: the model's weights by name, whole or sharded (DTensor), updated in place. moments: optimizer state tensors
    of a weight by key, each with the weight's shape (empty before the first update). second_moment: its running mean
    of g^2, free of bias, or None. `space.widths` are the allocated widths, in which units are counted; `live` says
    which of them are left. After a compaction a new PruningEngine is made for the new tensors and given the old one's
    state, sliced. landings: the ladder's shapes, largest first, the target's last. reduction: how processes that train
    the same model bring their parts together; each decides for itself, and all alike.
    """

    def __init__(
        self,
        space: Space,
        params: Mapping[str, Tensor],
        moments: Moments,
        *,
        second_moment: SecondMoment = lambda name: None,
        landings: Sequence[Landing],
        schedule: Schedule,
        options: PrunerOptions,
        live: Live | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self.space, self.params, self.moments = space, params, moments
        self._second_moment = second_moment
        self._reduction: Reduction = reduction or Alone()
        self.landings, self.schedule, self.options = tuple(landings), schedule, options
        self.live = live or Live.full(space.widths)
        self.criterion = criterion(options.saliency)
        self.average = MovingAverage(options.decay)
        self.calibration = Calibration()
        self.events = self.rung = 0
        self._nonfinite = 0  # gradients left out since the last step()
        self._uncalibrated = float("inf")  # parameters removed since the last calibration
        self._device = next(iter(params.values())).device
        self._frozen = self._slices_to_hold()

    @property
    def widths(self) -> Widths:
        """Live widths."""
        return self.live.widths()

    @property
    def parameters(self) -> int:
        """Live parameters."""
        return int(self.space.num_params(self.widths))

    @property
    def size(self) -> float:
        """What the live widths cost, in what the target and the schedule count (costs.py)."""
        size: float = self.landing.cost(self.widths)
        return size

    @property
    def landing(self) -> Landing:
        """Where the model lands next: a rung of the ladder, or at last the target."""
        return self.landings[self.rung]

    @property
    def finished(self) -> bool:
        return self.rung == len(self.landings) - 1 and self.landing.reached(self.widths)

    def observe(self) -> None:
        """Takes the saliency from the gradients now in .grad; call it between backward() and clipping.

        Also clears the gradient of dead query heads: with its query at zero such a head attends evenly, so the
        columns of o_proj that read it would otherwise be trained back to life; and that of dead layers, whose biases
        may have one. KV groups, FFN and stem units need no such care.
        """
        for part in self._frozen:
            gradient = self.params[part.name].grad
            if gradient is not None:
                fill(gradient, part.dim, part.indices)
        if self.finished or self.criterion.needs != "gradient":
            return
        if all(weight.grad is None for weight in self.params.values()):
            raise ValueError("observe() found no gradient; call it after backward() and before zero_grad()")
        scores = self._unit_scores()
        if all_finite(scores):
            self.average.update(scores)
        else:  # in the average it would stay for good
            self._nonfinite += 1

    def _unit_scores(self) -> dict[str, Tensor]:
        return unit_scores(self.space, self.criterion, self._weights(), self._device, self._reduction)

    def _look(self, probe: Probe, report: PruneReport) -> None:
        """Brings the scores up to date before a bundle. The gradient of the step itself has been observed already."""
        needs = self.criterion.needs
        if needs == "gradient":
            if report.events:
                with torch.enable_grad():
                    probe.refresh()
                self.observe()
                report.refreshes += 1
            if not self.average.sums:
                raise ValueError("step() has no saliency to go by; call observe() after every backward()")
        elif needs == "weights":
            self.average.update(self._unit_scores())
        elif needs == "inputs":
            readers = reader_specs(self.space)
            inputs = probe.inputs([spec.name for spec in readers])
            scores = input_scores(
                self.space, self.criterion, readers, self.params, inputs, self._device, self._reduction
            )
            self.average.update(scores)
            distinct = {id(inputs[spec.name]): inputs[spec.name].shape for spec in readers}
            processes = self._reduction.processes
            report.flops += sum(
                self.criterion.statistic_flops(tokens * processes, width) for tokens, width in distinct.values()
            )
        elif not self.average.sums:
            scores = drawn_scores(self.space, self.options.seed)
            self.average.update({name: score.to(self._device) for name, score in scores.items()})

    def _weights(self) -> Iterator[tuple[ParamSpec, Tensor, Tensor, Tensor | None]]:
        """(spec, w, g, F) of every weight, without those that want a gradient; F where the criterion looks at it.

        Sharded weights come as they are; whoever reads them takes the local part.
        """
        for spec in self.space.params:
            weight = self.params[spec.name]
            gradient = weight.grad if self.criterion.needs == "gradient" else weight
            if gradient is not None:
                fisher = self._second_moment(spec.name) if self.criterion.second_moment else None
                yield spec, weight.detach(), gradient, fisher

    @torch.no_grad()
    def step(self, position: float, probe: Probe) -> PruneReport:
        """Carries out every event that is due at `position` (the schedule's unit).

        Removes at most `bound` of the live parameters between two looks at the model; where the schedule asks for
        more, the probe takes the gradient (or the inputs) anew, without a weight update, before the next bundle.
        """
        report = PruneReport()
        gathers = self.options.gathers and self.criterion.needs in ("inputs", "weights") and not self.finished
        if gathers and not self._due(position):
            self._look(probe, report)
        while self._due(position) and report.rung is None:
            self._look(probe, report)
            ranking = Ranking(self.average.values(), self.live)
            stale = self._uncalibrated >= self.options.bound * self.parameters or bool(report.events)
            if self._compares_types and stale:
                self._calibrate(ranking, probe, report)
            bundle = self._choose_bundle(ranking, position, report)
            if self.options.correction:
                self._correct(bundle, probe, report.corrections)
            self.zero(bundle)
        report.flops += report.corrections.flops
        report.nonfinite += self._nonfinite
        self._nonfinite = 0
        report.ratios = {name: self.calibration.ratio(name) for name in self.calibration.predicted}
        return report

    def _due(self, position: float) -> bool:
        return not self.finished and self.schedule.wants(position, self.size, self.events)

    def _choose_bundle(self, ranking: Ranking, position: float, report: PruneReport) -> list[Event]:
        """Events one by one from one ranking until the schedule is content or the bound is met; no longer live."""
        bundle: list[Event] = []
        removed, limit = 0.0, self.options.bound * self.parameters
        while self._due(position):
            weighed = candidates(
                ranking,
                self.widths,
                landing=self.landing,
                calibration=self.calibration if self._compares_types else None,
                types=self.options.types,
            )
            falling = {each.event.type: each.parameters for each in weighed}
            report.damages = {each.event.type: each.event.saliency / falling[each.event.type] for each in weighed}
            event = self._choose(weighed)
            assert event is not None, "an unfinished run always has an allowed event (Landing)"
            fell, before = falling[event.type], self.size
            if bundle and removed + fell > limit:
                break
            self.live.remove(event)
            ranking.take(event)
            self.events += 1
            removed += fell
            bundle.append(event)
            report.events.append(AppliedEvent(event, self.parameters, self.widths, fell, before - self.size))
            if self.rung < len(self.landings) - 1 and self.landing.reached(self.widths):
                report.rung = self.rung
                self.rung += 1
                break
        self._uncalibrated += removed
        return bundle

    @property
    def _compares_types(self) -> bool:
        """Whether measured losses decide between types; on a pruning path nothing is left to decide."""
        return self.options.calibrated and self.options.order == "saliency"

    def _choose(self, weighed: Sequence[Candidate]) -> Event | None:
        if self.options.order == "saliency":
            return least_damage(weighed)
        final = self.landing.shape()
        return next_on_path(weighed, self.options.order, self.widths, source=self.landing.space.widths, final=final)

    def _correct(self, bundle: Sequence[Cut], probe: Probe, report: Corrections) -> None:
        """Lets what is left of every layer make up for the inputs that the bundle takes from it."""
        assert self.options.correction is not None
        readers = list(losing_readers(self.space, bundle, self.live))
        names = list(dict.fromkeys(reader.name for reader in readers))  # both attention types lose inputs of o_proj
        done = correct(self.params, readers, probe.inputs(names), self.options.correction, self._reduction)
        report.done += done.done
        report.flops += done.flops
        report.skipped += done.skipped

    def zero(self, events: Sequence[Cut]) -> None:
        """Sets the events' groups to exactly 0.0, weights and optimizer moments alike."""
        for part in group_slices(self.space, events):
            for tensor in (self.params[part.name], *self.moments(part.name).values()):
                fill(tensor, part.dim, part.indices)
        if any(event.type in (ATTENTION_QUERY, DEPTH) for event in events):
            self._frozen = self._slices_to_hold()

    def _slices_to_hold(self) -> list[Slice]:
        parts = dead_slices(self.space, self.live)
        return [Slice(part.name, part.dim, part.indices.to(self._device)) for part in parts]

    def _calibrate(self, ranking: Ranking, probe: Probe, report: PruneReport) -> None:
        bundles = next_bundles(
            ranking, self.widths, landing=self.landing, bound=self.options.bound, types=self.options.types
        )
        report.nonfinite += measure(self.calibration, bundles, self.space, self.params, probe)
        report.calibrations += 1
        self._uncalibrated = 0.0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and plain JSON values."""
        tensors = {f"live.{name}": mask for name, mask in self.live.tensors().items()}
        tensors |= {f"saliency.{name}": total for name, total in self.average.sums.items()}
        uncalibrated = None if self._uncalibrated == float("inf") else self._uncalibrated
        facts = {
            "events": self.events,
            "rung": self.rung,
            "saliency_weight": self.average.weight,
            "uncalibrated": uncalibrated,
            "calibration": asdict(self.calibration),
        }
        return tensors, facts

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Takes up where `state` left off, from copies; the tensors must belong to `space.widths`."""
        self.live = Live(
            {name: tensors[f"live.{name}"].to("cpu", torch.bool, copy=True) for name in self.live.tensors()}
        )
        prefix = "saliency."
        self.average.sums = {
            name.removeprefix(prefix): total.to(self._device, copy=True)
            for name, total in tensors.items()
            if name.startswith(prefix)
        }
        self.events, self.rung, self.average.weight = facts["events"], facts["rung"], facts["saliency_weight"]
        self._uncalibrated = float("inf") if facts["uncalibrated"] is None else facts["uncalibrated"]
        self.calibration = Calibration(**facts["calibration"])
        self._frozen = self._slices_to_hold()
