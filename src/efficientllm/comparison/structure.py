"""Which units of the source a run has kept, replayed from its journals; and how alike that is over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficientllm.comparison.statistics import chance_jaccard, jaccard
from efficientllm.errors import UsageError
from efficientllm.pruning.history import fallen_at
from efficientllm.pruning.widths import Widths

KeptUnits = dict[str, list[frozenset[int]]]  # type -> one set of source indices a row (layer; query: a KV group of it)


def kept_units(
    source: Widths, events: Sequence[Mapping[str, Any]], compactions: Sequence[Mapping[str, Any]]
) -> KeptUnits:
    """Units of the source that are live at the end, in the source's own numbering; rows that are gone are empty.

    Query heads are numbered within their KV group, of which there are layers times KV heads in the source.
    Raises UsageError where the journals do not fit each other.
    """
    try:
        when = fallen_at(source, events, compactions)
    except ValueError as error:
        raise UsageError(f"events.jsonl and compactions.jsonl are damaged: {error}") from error
    return {
        kind: [frozenset(row.isinf().nonzero().flatten().tolist()) for row in table] for kind, table in when.items()
    }


@dataclass(frozen=True)
class Overlap:
    """Mean Jaccard index over pairs of seeds and rows, and its expectation if each had kept as many by chance."""

    jaccard: float
    chance: float


def overlaps(seeds: Sequence[KeptUnits], source: Widths) -> dict[str, Overlap]:
    """Overlap by pruning type, of the rows that every seed has kept; types of which nothing fell are left out."""
    found = {}
    for kind in seeds[0]:
        total = source.count(kind)
        rows = [row for row in zip(*(kept[kind] for kept in seeds), strict=True) if all(row)]
        if not rows or all(len(units) == total for row in rows for units in row):
            continue
        own = sum(jaccard(row) for row in rows) / len(rows)
        chances = [
            chance_jaccard(len(a), len(b), total) for row in rows for i, a in enumerate(row) for b in row[i + 1 :]
        ]
        found[kind] = Overlap(own, sum(chances) / len(chances))
    return found
