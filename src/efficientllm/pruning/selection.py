"""Which event comes next: damage per parameter removed (or per unit of another cost), one currency for all types.

A score that ranks units well within a type still has another scale in each type (docs/method.md, "Which type"), so the
types are compared through measured ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientllm.pruning.calibration import CALIBRATION_SHARE, Bundle, Calibration
from efficientllm.pruning.groups import (
    ATTENTION,
    ATTENTION_QUERY,
    DEPTH,
    FFN_TYPE,
    PRUNING_TYPES,
    STEM,
    Cut,
    Event,
    Live,
    Widths,
)
from efficientllm.pruning.landing import Landing

# Where a measured cost is flat, noise may have hidden what an event saves: it counts as at least this share of what an
# event of its type saves on average, or no saliency however small would make it fall.
LEAST_PRICE = 0.05


class Ranking:
    """The order in which each type's live units would fall: per row, least salient first, ties to the lower index."""

    def __init__(self, scores: Mapping[str, Tensor], live: Live) -> None:
        self._scores, self._live = scores, live
        self._orders: dict[str, tuple[Tensor, Tensor]] = {}
        self._taken: dict[str, int] = dict.fromkeys(PRUNING_TYPES, 0)

    def _order(self, pruning_type: str) -> tuple[Tensor, Tensor]:
        """(units (events, rows) with -1 in dead rows, saliency (events,) fp64: the sum over the event's units)."""
        if pruning_type not in self._orders:
            live = self._live.units(pruning_type)
            scores = self._scores[pruning_type].double().masked_fill(~live, torch.inf)
            values, units = scores.sort(dim=1, stable=True)
            units = units.masked_fill(values.isinf(), -1)
            saliency = values.masked_fill(values.isinf(), 0.0).sum(0)
            self._orders[pruning_type] = units.T, saliency
            self._taken[pruning_type] = 0
        return self._orders[pruning_type]

    def upcoming(self, pruning_type: str, events: int) -> tuple[Tensor, float]:
        """Units (events, rows) of the next events of a type, and their saliency summed."""
        units, saliency = self._order(pruning_type)
        first = self._taken[pruning_type]
        return units[first : first + events], float(saliency[first : first + events].sum())

    def take(self, event: Cut) -> None:
        """Moves on after an event, which must be dead already. One that takes units of other types reorders those."""
        self._taken[event.type] += 1
        layered = (ATTENTION, ATTENTION_QUERY, FFN_TYPE)
        others = {ATTENTION: (ATTENTION_QUERY,), ATTENTION_QUERY: (ATTENTION,), DEPTH: layered}.get(event.type, ())
        for other in others:
            self._orders.pop(other, None)


@dataclass(frozen=True)
class Candidate:
    """A type's next event, weighed. allowed: a final shape stays within reach if it is taken; else it has no price.
    parameters: what falls with it."""

    event: Event
    allowed: bool
    parameters: int


def candidates(
    ranking: Ranking,
    widths: Widths,
    *,
    landing: Landing,
    calibration: Calibration | None,
    types: Sequence[str],
) -> list[Candidate]:
    """The next event of every type that has more than one unit a row left, priced in the landing's cost. `widths`
    are the live ones."""
    weighed, now = [], landing.cost(widths)
    for pruning_type in PRUNING_TYPES:
        if pruning_type not in types or widths.count(pruning_type) <= 1:
            continue
        units, saliency = ranking.upcoming(pruning_type, 1)
        if calibration is not None:
            saliency *= calibration.ratio(pruning_type)
        after = widths.after(pruning_type)
        allowed = landing.reachable(after)  # below the floors a latency table may say nothing
        price = now - landing.cost(after) if allowed else 0
        if allowed and landing.cost.measured:
            price = max(price, LEAST_PRICE * landing.mean_saving(pruning_type))
        event = Event(pruning_type, units[0], saliency, price)
        weighed.append(Candidate(event, allowed, landing.space.event_cost(pruning_type, widths)))
    return weighed


def next_bundles(
    ranking: Ranking, widths: Widths, *, landing: Landing, bound: float, types: Sequence[str]
) -> list[Bundle]:
    """Of every type that may fall now the events that calibration measures: about 1 % of the live parameters (at most
    `bound`), at least one event, and none below the type's floor."""
    space, bundles = landing.space, []
    for pruning_type in types:
        if not landing.may_fall(pruning_type, widths):
            continue
        left = widths.count(pruning_type) - landing.least(pruning_type)
        share = min(bound, CALIBRATION_SHARE) * space.num_params(widths)
        number = min(left, max(1, round(share / space.event_cost(pruning_type, widths))))
        units, predicted = ranking.upcoming(pruning_type, number)
        bundles.append(Bundle(pruning_type, [Cut(pruning_type, row) for row in units], predicted))
    return bundles


# The paper's pruning paths (appendix A.2): which type goes first, towards one fixed shape.
ORDERS = {
    "attention-first": (ATTENTION, ATTENTION_QUERY, FFN_TYPE, STEM, DEPTH),
    "ffn-first": (FFN_TYPE, ATTENTION, ATTENTION_QUERY, STEM, DEPTH),
    "stem-first": (STEM, ATTENTION, ATTENTION_QUERY, FFN_TYPE, DEPTH),
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
