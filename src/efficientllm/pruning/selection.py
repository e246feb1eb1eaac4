"""Which event comes next: the run heads for the feasible shape of the least predicted damage, cheapest type first.

Damage per parameter removed (or per unit of another cost) is the one currency for all types, by their scores as they
are. Those in nats share a scale; others may rank units well within a type and still have another scale in each
(docs/method.md, "Which type").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import (
    ATTENTION,
    ATTENTION_QUERY,
    DEPTH,
    DIMENSIONS,
    EXPERT,
    EXPERT_FFN,
    FFN_TYPE,
    STEM,
    of_type,
)
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Event, Removal
from efficientllm.pruning.live import Live
from efficientllm.pruning.widths import Widths


class Ranking:
    """The order in which each type's live units would fall: per row, least salient first, ties to the lower index."""

    def __init__(self, scores: Mapping[str, Tensor], live: Live) -> None:
        self._scores, self._live = scores, live
        self._orders: dict[str, tuple[Tensor, Tensor]] = {}

    def _order(self, pruning_type: str) -> tuple[Tensor, Tensor]:
        """(units (events, rows) with -1 in dead rows, saliency (events,) fp64: the sum over the event's units)."""
        if pruning_type not in self._orders:
            live = self._live.units(pruning_type)
            scores = self._scores[pruning_type].double().masked_fill(~live, torch.inf)
            values, units = scores.sort(dim=1, stable=True)
            units = units.masked_fill(values.isinf(), -1)
            saliency = values.masked_fill(values.isinf(), 0.0).sum(0)
            self._orders[pruning_type] = units.T, saliency
        return self._orders[pruning_type]

    def upcoming(self, pruning_type: str, events: int) -> tuple[Tensor, float]:
        """Units (events, rows) of the next events of a type, and their saliency summed."""
        units, saliency = self._order(pruning_type)
        return units[:events], float(saliency[:events].sum())

    def ahead(self, pruning_type: str, events: int) -> Tensor:
        """(events + 1,) fp64: saliency of a type's next 0, 1, ... `events` events summed."""
        _, saliency = self._order(pruning_type)
        return torch.cat([saliency.new_zeros(1), saliency[:events].cumsum(0)])

    def take(self, event: Removal) -> None:
        """Moves on after an event, which must be dead already. One that takes units of other types reorders those."""
        if event.type in self._orders:
            units, saliency = self._orders[event.type]
            self._orders[event.type] = units[1:], saliency[1:]
        own = of_type(event.type)
        for other in DIMENSIONS.values():
            if other is not own and (own.name in other.chain or other.name in own.chain):
                self._orders.pop(other.type, None)


def damages_ahead(ranking: Ranking, widths: Widths, *, feasible: FeasibleShapes, types: Sequence[str]) -> Tensor:
    """The saliency that falls on the way to each feasible shape, fp64 (shapes,); inf out of reach.

    A shape far under the target pays for all that it gives up, and one whose width is on its way to that shape's
    aligned stop only for what is left of the way. What falls with a layer or a KV head falls once: the units of the
    types within them count for the share of layers and KV heads that stays.
    """
    here, damage = torch.tensor(feasible.place(widths)), {}
    ways = here - feasible.shapes
    for pruning_type, way in zip(feasible.types, ways.clamp(min=0).T, strict=True):
        along = ranking.ahead(pruning_type, int(way.max())) if pruning_type in types else torch.zeros(1).double()
        damage[pruning_type] = along[way]
    left = dict(zip(feasible.types, (feasible.shapes.double() / here).T, strict=True))
    total = torch.zeros(len(feasible.shapes), dtype=torch.float64)
    for pruning_type, own in damage.items():
        outer = [left[DIMENSIONS[name].type] for name in of_type(pruning_type).outer]
        total += own * torch.stack(outer).prod(0) if outer else own
    within = (ways >= 0).all(1)
    return torch.where(within, total, torch.inf)


def least_damaging(ranking: Ranking, widths: Widths, *, feasible: FeasibleShapes, types: Sequence[str]) -> Widths:
    """Of the feasible shapes within reach the one on the way to which the least saliency falls; ties go to the
    largest."""
    total = damages_ahead(ranking, widths, feasible=feasible, types=types)
    assert bool((total < torch.inf).any()), "a feasible shape stays within reach (feasible.py)"
    return feasible.shape_of(feasible.shapes[total.argmin()].tolist())


@dataclass(frozen=True)
class Candidate:
    """A type's next event, weighed. allowed: it leads to the shape that the run heads for; else it has no price.
    parameters: what falls with it."""

    event: Event
    allowed: bool
    parameters: int


def candidates(ranking: Ranking, widths: Widths, *, feasible: FeasibleShapes, types: Sequence[str]) -> list[Candidate]:
    """The next event of every type that has more than one unit a row left. `widths` are the live ones.

    The price of one is what the run's cost falls by on the type's whole way to the shape that the run heads for,
    shared evenly among the events there: of a cost that is affine in every width, such as parameters, what the event
    itself saves; of a measured one more than the noise between two neighbours.
    """
    goal = least_damaging(ranking, widths, feasible=feasible, types=types)
    weighed, now = [], feasible.cost(widths)
    for pruning_type in widths.types():
        if pruning_type not in types or widths.count(pruning_type) <= 1:
            continue
        units, saliency = ranking.upcoming(pruning_type, 1)
        way = widths.count(pruning_type) - goal.count(pruning_type)
        price = (now - feasible.cost(widths.after(pruning_type, way))) / way if way else 0.0
        event = Event(pruning_type, units[0], saliency, price)
        weighed.append(Candidate(event, way > 0, feasible.space.event_cost(pruning_type, widths)))
    return weighed


# The paper's pruning paths (appendix A.2): which type goes first, towards one fixed shape.
ORDERS = {
    "attention-first": (ATTENTION, ATTENTION_QUERY, FFN_TYPE, EXPERT, EXPERT_FFN, STEM, DEPTH),
    "ffn-first": (FFN_TYPE, EXPERT, EXPERT_FFN, ATTENTION, ATTENTION_QUERY, STEM, DEPTH),
    "stem-first": (STEM, ATTENTION, ATTENTION_QUERY, FFN_TYPE, EXPERT, EXPERT_FFN, DEPTH),
}


def next_on_path(
    weighed: Sequence[Candidate], order: str, widths: Widths, *, source: Widths, final: Widths
) -> Event | None:
    """The next event on a pruning path from `source` to `final` widths; saliency has chosen its units only.

    order: one of ORDERS, or "interleaved": the type that has the largest share of its way left, ties to the first.
    """
    allowed = {candidate.event.type: candidate.event for candidate in weighed if candidate.allowed}
    if order in ORDERS:
        return next((allowed[name] for name in ORDERS[order] if name in allowed), None)
    return allowed[most_left(list(allowed), widths, source, final)] if allowed else None


def most_left(types: Sequence[str], widths: Widths, source: Widths, final: Widths) -> str:
    """The type that has the largest share of its way from `source` to `final` left, ties to the first. All of them have
    a way to go."""

    def left(pruning_type: str) -> float:
        goal = final.count(pruning_type)
        return (widths.count(pruning_type) - goal) / (source.count(pruning_type) - goal)

    return max(types, key=left)


def least_damage(weighed: Sequence[Candidate]) -> Event | None:
    """The allowed event with the least damage; ties, events that save nothing among them, go to the least saliency a
    parameter, then to the first type."""
    allowed = [candidate for candidate in weighed if candidate.allowed]
    least = min(allowed, key=lambda each: (each.event.damage, each.event.saliency / each.parameters), default=None)
    return least.event if least else None
