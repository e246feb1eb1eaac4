"""What falls next, decided from widths, damages and the schedule alone.

The engine carries out what is decided here; a plan, which has neither model nor scores, counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS
from efficientllm.pruning.feasible import FeasibleShapes
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
    """An event, and where it leaves the run. parameters: that are live after it; removed: that fall with it; saved:
    what it takes from the run's cost, of a measured one maybe less than the event's price."""

    event: C
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
    """Where a run may end and when it prunes. milestones: the ladder's shapes, largest first, the target's last.

    parameters, cost: of widths; the cost is what target and schedule count (costs.py).
    """

    def __init__(self, milestones: Sequence[FeasibleShapes], schedule: Schedule) -> None:
        self.milestones, self.schedule = tuple(milestones), schedule
        space = self.milestones[-1].space
        self.parameters = lru_cache(1 << 16)(lambda widths: int(space.num_params(widths)))
        self.cost: Callable[[Widths], float] = lru_cache(1 << 16)(self.milestones[-1].cost)  # all count the same

    def finished(self, at: Standing) -> bool:
        """Whether the run is where it was to end."""
        return at.milestone == len(self.milestones) - 1 and self.milestones[-1].reached(at.widths)

    def due(self, at: Standing, position: float) -> bool:
        """Whether an event is to happen at a position (the schedule's unit)."""
        return not self.finished(at) and self.schedule.wants(position, self.cost(at.widths), at.events)

    def bundle(self, at: Standing, position: float, guide: Guide[C], bound: float) -> list[Decided[C]]:
        """The next bundle: until the schedule is content, the bound is met or a milestone is reached, which is left
        behind then, but for the last. An event that is larger than the bound by itself waits for a look of its own.
        bound: as of PrunerOptions."""
        bundle: list[Decided[C]] = []
        removed, limit = 0, bound * self.parameters(at.widths)
        while self.due(at, position):
            feasible = self.milestones[at.milestone]
            event = guide.next(at.widths, feasible)
            widths = at.widths.after(event.type)
            parameters = self.parameters(widths)
            falls = self.parameters(at.widths) - parameters
            if bundle and removed + falls > limit:
                break
            guide.take(event)
            leaves = feasible is not self.milestones[-1] and feasible.reached(widths)
            after = Standing(widths, at.events + 1, at.milestone + leaves)
            bundle.append(Decided(event, after, parameters, falls, self.cost(at.widths) - self.cost(widths)))
            if leaves:
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
