"""The method in two calls, for any training loop: observe() after the backward pass, step() after the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from efficientllm.pruning.correction import Corrections, SolverOptions, correct, losing_readers
from efficientllm.pruning.groups import ATTENTION_QUERY, Event, Live, ParamSpec, Slice, Space, Widths, group_slices
from efficientllm.pruning.landing import Landing
from efficientllm.pruning.saliency import MovingAverage, criterion, unit_scores
from efficientllm.pruning.schedule import Schedule
from efficientllm.pruning.selection import Calibration, Ranking, candidates, least_damage

Moments = Callable[[str], Mapping[str, Tensor]]
SecondMoment = Callable[[str], Tensor | None]


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
    """The method's dials; METHOD section 5 for the defaults.

    types: pruning types that may be chosen. saliency: name of the criterion. decay: of its moving average.
    calibrated: compare types by measured loss, not by raw scores. bound: largest share of the live parameters
    removed between two refreshes of saliency and calibration (one event is always allowed). correction: the
    second-order update of what is left; None leaves it out.
    """

    types: tuple[str, ...]
    saliency: str = "taylor-element"
    decay: float = 0.9
    calibrated: bool = True
    bound: float = 0.01
    correction: SolverOptions | None = None


@dataclass(frozen=True)
class AppliedEvent:
    """An event that has happened, and the model it left behind."""

    event: Event
    parameters: int
    widths: Widths


@dataclass
class PruneReport:
    """What one step() did. damages: calibrated damage per parameter of each type's next event, as last seen."""

    events: list[AppliedEvent] = field(default_factory=list)
    damages: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    refreshes: int = 0
    calibrations: int = 0
    corrections: Corrections = field(default_factory=Corrections)


class PruningEngine:
    """Decides and carries out pruning events on a fixed set of tensors.

    params: the model's weights by name, updated in place. moments: optimizer state tensors of a weight by key,
    each with the weight's shape (empty before the first update). second_moment: its running mean of g^2, free of
    bias, or None. `space.widths` are the allocated widths, in
    which units are counted; `live` says which of them are left. After a compaction a new PruningEngine is made for the
    new tensors and given the old one's state, sliced.
    """

    def __init__(
        self,
        space: Space,
        params: Mapping[str, Tensor],
        moments: Moments,
        *,
        second_moment: SecondMoment = lambda name: None,
        landing: Landing,
        schedule: Schedule,
        options: PrunerOptions,
        live: Live | None = None,
    ) -> None:
        self.space, self.params, self.moments = space, params, moments
        self._second_moment = second_moment
        self.landing, self.schedule, self.options = landing, schedule, options
        self.live = live or Live.full(space.widths)
        self.criterion = criterion(options.saliency)
        self.average = MovingAverage(options.decay)
        self.calibration = Calibration()
        self.events = 0
        self._uncalibrated = float("inf")  # parameters removed since the last calibration
        self._device = next(iter(params.values())).device
        self._frozen = self._dead_query_slices()

    @property
    def widths(self) -> Widths:
        """Live widths."""
        return self.live.widths()

    @property
    def parameters(self) -> int:
        """Live parameters."""
        return int(self.space.num_params(self.widths))

    @property
    def finished(self) -> bool:
        return self.landing.reached(self.widths)

    def observe(self) -> None:
        """Takes the saliency from the gradients now in .grad; call it between backward() and clipping.

        Also clears the gradient of dead query heads: with its query at zero such a head attends evenly, so the
        columns of o_proj that read it would otherwise be trained back to life (KV groups, FFN and stem units
        need no such care).
        """
        for part in self._frozen:
            gradient = self.params[part.name].grad
            if gradient is not None:
                gradient.index_fill_(part.dim, part.indices, 0.0)
        if self.finished:
            return
        if all(weight.grad is None for weight in self.params.values()):
            raise ValueError("observe() found no gradient; call it after backward() and before zero_grad()")
        self.average.update(unit_scores(self.space, self.criterion, self._weights(), self._device))

    def _weights(self) -> Iterator[tuple[ParamSpec, Tensor, Tensor, Tensor | None]]:
        """(spec, w, g, F) of every weight that has a gradient; F only where the criterion looks at it."""
        for spec in self.space.params:
            weight = self.params[spec.name]
            if weight.grad is not None:
                fisher = self._second_moment(spec.name) if self.criterion.second_moment else None
                yield spec, weight.detach(), weight.grad, fisher

    @torch.no_grad()
    def step(self, position: float, probe: Probe) -> PruneReport:
        """Carries out every event that is due at `position` (the schedule's unit).

        Removes at most `bound` of the live parameters between two looks at the gradient; where the schedule asks
        for more, the probe takes the gradient anew, without a weight update, before the next bundle.
        """
        report = PruneReport()
        if self._due(position) and not self.average.sums:
            raise ValueError("step() has no saliency to go by; call observe() after every backward()")
        while self._due(position):
            if report.events:
                with torch.enable_grad():
                    probe.refresh()
                self.observe()
                report.refreshes += 1
            ranking = Ranking(self.average.values(), self.live)
            stale = self._uncalibrated >= self.options.bound * self.parameters or bool(report.events)
            if self.options.calibrated and stale:
                self._calibrate(ranking, probe)
                report.calibrations += 1
            bundle = self._choose_bundle(ranking, position, report)
            if self.options.correction:
                self._correct(bundle, probe, report.corrections)
            self.zero(bundle)
        report.ratios = {name: self.calibration.ratio(name) for name in self.calibration.predicted}
        return report

    def _due(self, position: float) -> bool:
        return not self.finished and self.schedule.wants(position, self.parameters, self.events)

    def _choose_bundle(self, ranking: Ranking, position: float, report: PruneReport) -> list[Event]:
        """Events one by one from one ranking until the schedule is content or the bound is met; no longer live."""
        bundle: list[Event] = []
        removed, limit = 0.0, self.options.bound * self.parameters
        while self._due(position):
            weighed = candidates(
                ranking,
                self.widths,
                space=self.space,
                landing=self.landing,
                calibration=self.calibration if self.options.calibrated else None,
                types=self.options.types,
            )
            report.damages = {each.event.type: each.event.damage for each in weighed}
            event = least_damage(weighed)
            assert event is not None, "an unfinished run always has an allowed event (Landing)"
            if bundle and removed + event.cost > limit:
                break
            ranking.take(event)
            self.live.remove(event)
            self.events += 1
            removed += event.cost
            bundle.append(event)
            report.events.append(AppliedEvent(event, self.parameters, self.widths))
        self._uncalibrated += removed
        return bundle

    def _correct(self, bundle: Sequence[Event], probe: Probe, report: Corrections) -> None:
        """Lets what is left of every layer make up for the inputs that the bundle takes from it."""
        assert self.options.correction is not None
        readers = list(losing_readers(self.space, bundle, self.live))
        done = correct(self.params, readers, probe.inputs([reader.name for reader in readers]), self.options.correction)
        report.done += done.done
        report.skipped += done.skipped

    def zero(self, events: Sequence[Event]) -> None:
        """Sets the events' groups to exactly 0.0, weights and optimizer moments alike."""
        for part in group_slices(self.space, events):
            indices = part.indices.to(self._device)
            for tensor in (self.params[part.name], *self.moments(part.name).values()):
                tensor.detach().index_fill_(part.dim, indices, 0.0)
        if any(event.type == ATTENTION_QUERY for event in events):
            self._frozen = self._dead_query_slices()

    def _dead_query_slices(self) -> list[Slice]:
        """Slices of dead query heads whose KV head is live."""
        dead = (~self.live.query & self.live.kv[:, :, None]).flatten(0, 1)
        events = []
        for unit in range(dead.shape[1]):
            units = torch.where(dead[:, unit], unit, -1)
            if bool((units >= 0).any()):
                events.append(Event(ATTENTION_QUERY, units, 0.0, 1.0))
        parts = group_slices(self.space, events)
        return [Slice(part.name, part.dim, part.indices.to(self._device)) for part in parts]

    def _calibrate(self, ranking: Ranking, probe: Probe) -> None:
        """Measures what zeroing each type's next bundle does to the loss, and puts every bit back.

        A bundle is large enough to stand above numerical noise: about `bound` of the live parameters. All
        measurements share one micro-batch, so that their differences are paired.
        """
        widths = self.widths
        unpruned = probe.loss()
        for pruning_type in self.options.types:
            left = widths.count(pruning_type) - 1
            if left < 1:
                continue
            cost = self.space.event_cost(pruning_type, widths)
            number = min(left, max(1, round(self.options.bound * self.parameters / cost)))
            units, predicted = ranking.upcoming(pruning_type, number)
            events = [Event(pruning_type, row, 0.0, 1.0) for row in units]
            saved = self._cut_out(events)
            measured = probe.loss() - unpruned
            for part, values in saved:
                self.params[part.name].detach().index_copy_(part.dim, part.indices, values)
            self.calibration.update(pruning_type, measured, predicted)
        self._uncalibrated = 0.0

    def _cut_out(self, events: Sequence[Event]) -> list[tuple[Slice, Tensor]]:
        """Zeroes the weights (not the moments) of the events' groups; returns what was there."""
        saved = []
        for part in group_slices(self.space, events):
            weight = self.params[part.name].detach()
            part = Slice(part.name, part.dim, part.indices.to(self._device))
            saved.append((part, weight.index_select(part.dim, part.indices)))
        for part, _ in saved:
            self.params[part.name].detach().index_fill_(part.dim, part.indices, 0.0)
        return saved

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and plain JSON values."""
        tensors = {f"live.{name}": mask for name, mask in self.live.tensors().items()}
        tensors |= {f"saliency.{name}": total for name, total in self.average.sums.items()}
        uncalibrated = None if self._uncalibrated == float("inf") else self._uncalibrated
        facts = {
            "events": self.events,
            "saliency_weight": self.average.weight,
            "uncalibrated": uncalibrated,
            "calibration": asdict(self.calibration),
        }
        return tensors, facts

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Takes up where `state` left off, from copies; the tensors must belong to `space.widths`."""
        self.live = Live(
            **{name: tensors[f"live.{name}"].to("cpu", torch.bool, copy=True) for name in self.live.tensors()}
        )
        prefix = "saliency."
        self.average.sums = {
            name.removeprefix(prefix): total.to(self._device, copy=True)
            for name, total in tensors.items()
            if name.startswith(prefix)
        }
        self.events, self.average.weight = facts["events"], facts["saliency_weight"]
        self._uncalibrated = float("inf") if facts["uncalibrated"] is None else facts["uncalibrated"]
        self.calibration = Calibration(**facts["calibration"])
        self._frozen = self._dead_query_slices()
