"""What falls next, decided from widths, damages and the schedule alone.

The engine carries out what is decided here; a plan, which has neither model nor scores, counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS
from efficientllm.pruning.feasible import FeasibleShapes, arrived, milestone_after
from efficientllm.pruning.groups import Event, Removal
from efficientllm.pruning.live import Live
from efficientllm.pruning.schedule import Schedule
from efficientllm.pruning.selection import (
    Ranking,
    candidates,
    damages_ahead,
    least_damage,
    most_left,
    next_on_path,
)
from efficientllm.pruning.widths import Widths

C = TypeVar("C", bound=Removal)


@dataclass(frozen=True)
class Standing:
    """How far a run has come: live widths, events so far, and the milestone that it heads for."""

    widths: Widths
    events: int = 0
    milestone: int = 0


@dataclass(frozen=True)
class Decided(Generic[C]):
    """A removal, and where it leaves the run. removed: parameters that fall with it; saved: what it takes from the
    cost."""

    removal: C
    after: Standing
    parameters: int
    removed: int
    saved: float


class Guide(Protocol[C]):
    """Names one removal after the other."""

    def next(self, widths: Widths, feasible: FeasibleShapes) -> C:
        """The next removal of a model of these live widths, which are no feasible shape yet."""
        ...

    def take(self, removal: C) -> None:
        """The removal has been decided on."""
        ...


class Course:
    """Where a run may end and when it prunes. milestones: the ladder's shapes, largest first, the target's last."""

    def __init__(self, milestones: Sequence[FeasibleShapes], schedule: Schedule) -> None:
        self.milestones, self.schedule = tuple(milestones), schedule
        space = self.milestones[-1].space
        self.parameters = lru_cache(1 << 16)(lambda widths: int(space.num_params(widths)))
        self._cost = lru_cache(1 << 16)(self.milestones[-1].cost)  # all of them count the same

    def feasible(self, at: Standing) -> FeasibleShapes:
        """The shapes that it heads for: those of a size of the ladder, or at last of the target."""
        return self.milestones[at.milestone]

    def size(self, at: Standing) -> float:
        """What the live widths cost, in what target and schedule count (costs.py)."""
        size: float = self._cost(at.widths)
        return size

    def finished(self, at: Standing) -> bool:
        return arrived(self.milestones, at.milestone, at.widths)

    def due(self, at: Standing, position: float) -> bool:
        """Whether an event is to happen at a position (the schedule's unit)."""
        return not self.finished(at) and self.schedule.wants(position, self.size(at), at.events)

    def bundle(self, at: Standing, position: float, guide: Guide[C], bound: float) -> list[Decided[C]]:
        """The next bundle: until the schedule is content, the bound is met or a milestone is reached. A removal that is
        larger than the bound by itself waits for a look of its own. bound: as of PrunerOptions."""
        bundle: list[Decided[C]] = []
        removed, limit = 0, bound * self.parameters(at.widths)
        while self.due(at, position):
            removal = guide.next(at.widths, self.feasible(at))
            widths = at.widths.after(removal.type)
            parameters = self.parameters(widths)
            falls = self.parameters(at.widths) - parameters
            if bundle and removed + falls > limit:
                break
            guide.take(removal)
            after = Standing(widths, at.events + 1, milestone_after(self.milestones, at.milestone, widths))
            bundle.append(Decided(removal, after, parameters, falls, self.size(at) - self._cost(widths)))
            if after.milestone > at.milestone:
                break
            at, removed = after, removed + falls
        return bundle


class ByDamage:
    """Towards the shape of the least damage, or along a pruning path (`order`, selection.py). scores: (rows, units) by
    type. live: the masks of what is left; what is taken falls there. damages: of each type's next event as last seen,
    per parameter (as PruneReport has them)."""

    def __init__(self, scores: Mapping[str, Tensor], live: Live, types: Sequence[str], order: str) -> None:
        self._ranking, self._live = Ranking(scores, live), live
        self._types, self._order = types, order
        self.damages: dict[str, float] = {}

    def next(self, widths: Widths, feasible: FeasibleShapes) -> Event:
        weighed = candidates(self._ranking, widths, feasible=feasible, types=self._types)
        self.damages = {each.event.type: each.event.saliency / each.parameters for each in weighed}
        if self._order == "saliency":
            event = least_damage(weighed)
        else:
            source, final = feasible.space.widths, feasible.shape()
            event = next_on_path(weighed, self._order, widths, source=source, final=final)
        assert event is not None, "an unfinished run always has an allowed event (feasible.py)"
        return event

    def ahead(self, widths: Widths, feasible: FeasibleShapes) -> float:
        """The least damage on the way to a feasible shape, nats; inf where none is within reach."""
        return float(damages_ahead(self._ranking, widths, feasible=feasible, types=self._types).min())

    def take(self, removal: Event) -> None:
        self._live.remove(removal)
        self._ranking.take(removal)


class ByShape:
    """Where there are no scores: towards each milestone's most balanced shape, the type first with the largest share
    of its way left. A run will end in other widths of the same size."""

    def __init__(self, types: Sequence[str]) -> None:
        self._types = [row.type for row in DIMENSIONS.values() if row.type in types]
        self._towards: tuple[FeasibleShapes, Widths] | None = None

    def next(self, widths: Widths, feasible: FeasibleShapes) -> Removal:
        if self._towards is None or self._towards[0] is not feasible:
            self._towards = feasible, feasible.balanced(within=widths)
        goal = self._towards[1]
        ahead = [name for name in self._types if widths.count(name) > goal.count(name)]
        return Removal(most_left(ahead, widths, feasible.space.widths, goal), torch.empty(0, dtype=torch.int64))

    def take(self, removal: Removal) -> None:
        """Nothing but the widths is kept of it."""
