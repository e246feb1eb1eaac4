"""The method in two calls, for any training loop: observe() after the backward pass, step() after the update.

Our own loop makes the two halves of observe() itself, since a step that is not finite lies between them: clear_dead()
before the gradient's norm is taken, looks.observe() once that is known to be a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from efficientllm.pruning.contract import LIVE, Moments, Probe, PruneReport, PrunerOptions
from efficientllm.pruning.correction import correct
from efficientllm.pruning.criteria import criteria_of
from efficientllm.pruning.decision import ByDamage, Course, Decided, Standing
from efficientllm.pruning.dimensions import DIMENSIONS, EXPERT, LAYERS, of_type
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Event, Removal, Slice, Space
from efficientllm.pruning.live import Live, part_of
from efficientllm.pruning.looks import Looks, scores_are_known
from efficientllm.pruning.readers import losing_readers, reader_specs
from efficientllm.pruning.schedule import Schedule
from efficientllm.pruning.shards import ALONE, World, fill
from efficientllm.pruning.slices import dead_slices, group_slices
from efficientllm.pruning.tokens import Tokens
from efficientllm.pruning.widths import Widths


class OtherRule(ValueError):
    """The state of an unfinished run of an earlier version, which would go on by another rule than it has begun by."""


class PruningEngine:
    """Decides and carries out pruning events on a fixed set of tensors.

    params: the model's weights by name, whole or sharded (DTensor), updated in place. moments: optimizer state tensors
    of a weight by key, each with the weight's shape (empty before the first update). `space.widths` are the allocated
    widths, in which units are counted; `live` says which of them are left. After a compaction a new engine is made for
    the new tensors and given the old one's state, sliced. milestones: the ladder's shapes, largest first, the target's
    last. reduction: how processes that train one model bring their parts together; each decides, and all alike.
    """

    def __init__(
        self,
        space: Space,
        params: Mapping[str, Tensor],
        moments: Moments,
        *,
        milestones: Sequence[FeasibleShapes],
        schedule: Schedule,
        options: PrunerOptions,
        reduction: World = ALONE,
    ) -> None:
        self.space, self.params, self.moments, self._reduction = space, params, moments, reduction
        self.course, self.options = Course(milestones, schedule), options
        self.live = Live.full(space.widths)
        criteria = criteria_of(options.saliency, options.types)
        self.looks = Looks(space, params, reduction, criteria=criteria, seed=options.seed)
        self.tokens = Tokens()
        self.at = Standing(space.widths)
        self._device = next(iter(params.values())).device
        self.held = self._slices_to_hold()

    @property
    def widths(self) -> Widths:
        """Live widths."""
        return self.at.widths

    @property
    def parameters(self) -> int:
        """Live parameters."""
        return self.course.parameters(self.widths)

    @property
    def feasible(self) -> FeasibleShapes:
        """The shapes that it heads for: those of a size of the ladder, or at last of the target."""
        return self.course.milestones[self.at.milestone]

    @property
    def finished(self) -> bool:
        return self.course.finished(self.at)

    def observe(self) -> None:
        """Takes the saliency from the gradients now in .grad; call it between backward() and clipping, every step."""
        self.clear_dead()
        if not self.finished:
            self.looks.observe()

    def clear_dead(self) -> None:
        """Clears the gradient of dead query heads: with its query at zero such a head attends evenly, so the columns of
        o_proj that read it would otherwise be trained back to life; and that of dead layers, whose biases may have one.
        KV groups, FFN and stem units need no such care. Before the gradient's norm is taken."""
        for part in self.held:
            gradient = self.params[part.name].grad
            if gradient is not None:
                fill(gradient, part.dim, part.indices, part.rows)

    @torch.no_grad()
    def step(self, position: float, probe: Probe) -> PruneReport:
        """Carries out every event that is due at `position` (the schedule's unit).

        Removes at most `bound` of the live parameters (or one larger event) between two looks; where more is due, the
        probe looks anew, without a weight update. Where all looks have been left out as no numbers, nothing falls, nor
        where tokens are to fall first.
        """
        report = PruneReport()
        self.looks.begin()
        while self.due(position) and report.milestone is None:
            names = self.reads()
            batches = 0 if report.events else self.options.look_batches
            inputs = self.looks.before_bundle(probe, names, batches, report)
            if not self.looks.complete:
                report.blind = True
                break
            if names and inputs is None:
                inputs = probe.inputs(names)
            guide = ByDamage(self.looks.average.values(), self.live.clone(), self.options.types, self.options.order)
            report.vocabulary = probe.vocabulary(guide, self.at)
            if report.vocabulary:
                break
            limit = self.options.bound * self.parameters
            bundle = self.course.bundle(self.at, position, guide, self.options.bound)
            report.damages = guide.damages
            self.looks.removed(sum(each.removed for each in bundle) / limit)
            self._act(bundle, inputs, report)
        report.nonfinite += self.looks.nonfinite
        self.looks.nonfinite = 0
        return report

    def due(self, position: float) -> bool:
        """Whether an event is to happen at a position."""
        return self.course.due(self.at, position)

    def reads(self) -> list[str]:
        """The linear layers whose inputs a bundle may want to see: all for a criterion that looks at them, else those
        of the types that may fall, where they are corrected."""
        readers = reader_specs(self.space)
        if "inputs" in self.looks.needs:
            return [spec.name for spec in readers]
        if not self.options.correction:
            return []
        falling = {of_type(name).name for name in self.options.types if self.feasible.may_fall(name, self.widths)}
        falling -= {LAYERS, EXPERT}  # they take no inputs from what stays
        return [spec.name for spec in readers if falling & set(DIMENSIONS[str(spec.inputs)].chain)]

    def _act(self, bundle: Sequence[Decided[Event]], inputs: Mapping[str, Tensor] | None, report: PruneReport) -> None:
        """Carries out what has been decided: what is left is corrected, the rest zeroed."""
        events = [each.event for each in bundle]
        for event in events:
            self.live.remove(event)
        report.events += bundle
        before, self.at = self.at, bundle[-1].after
        report.milestone = before.milestone if self.at.milestone > before.milestone else None
        if self.options.correction and inputs is not None:
            readers = list(losing_readers(self.space, events, self.live))
            done = correct(self.params, readers, inputs, self.options.correction, self._reduction)
            report.corrections.add(done)
            report.flops.correction += done.flops
        self.zero(events)

    def zero(self, events: Sequence[Removal]) -> None:
        """Sets the events' groups to exactly 0.0, weights and optimizer moments alike."""
        for part in group_slices(self.space, events):
            for tensor in (self.params[part.name], *self.moments(part.name).values()):
                fill(tensor, part.dim, part.indices, part.rows)
        if any(of_type(event.type).held for event in events):
            self.held = self._slices_to_hold()

    def _slices_to_hold(self) -> list[Slice]:
        return [replace(part, indices=part.indices.to(self._device)) for part in dead_slices(self.space, self.live)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: tensors, and plain JSON values."""
        scores, looked = self.looks.state()
        kept, asked = self.tokens.state()
        tensors = scores | {f"{LIVE}{name}": mask for name, mask in self.live.items()} | kept
        return tensors, looked | {"events": self.at.events, "rung": self.at.milestone} | asked

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Takes up where `state` left off, from copies. Raises ValueError for tensors that do not belong to
        `space.widths`, and OtherRule; nothing has changed then."""
        live = Live.saved(part_of(tensors, LIVE), self.space.widths)
        saved = Standing(live.widths(), facts["events"], facts["rung"])
        if facts.get("calibration", {}).get("measured") and not self.course.finished(saved):
            raise OtherRule(
                "the pruning types were compared by measured losses, which this version does not do: go on with the "
                "version that began, or begin anew"
            )
        self.live, self.at = live, saved
        self.tokens = Tokens.of(tensors, facts)
        if scores_are_known(facts):
            self.looks.load_state(tensors, facts)
        self.held = self._slices_to_hold()
