"""Which units of the source a run has kept, replayed from its journals; and how alike that is over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from efficientllm.comparison.statistics import chance_jaccard, jaccard
from efficientllm.errors import UsageError
from efficientllm.pruning.groups import ATTENTION, ATTENTION_QUERY, DEPTH, FFN_TYPE, STEM, Event, Live, Widths
from efficientllm.pruning.surgery import choose_kept, cut_live

KeptUnits = dict[str, list[frozenset[int]]]  # type -> one set of source indices a row (layer; query: a KV group of it)


def kept_units(
    source: Widths, events: Sequence[Mapping[str, Any]], compactions: Sequence[Mapping[str, Any]]
) -> KeptUnits:
    """Units of the source that are live at the end, in the source's own numbering; rows that are gone are empty.

    Query heads are numbered within their KV group, of which there are layers times KV heads in the source.
    Raises UsageError where the journals do not fit each other.
    """
    live, alive = Live.full(source), Live.full(source)
    names = {key: torch.arange(value.numel()).view(value.shape) for key, value in live.tensors().items()}
    # Within a step events come first: compaction cuts what they have zeroed.
    lines = [(line["step"], 0, line) for line in events] + [(line["step"], 1, line) for line in compactions]
    try:
        for _, kind, line in sorted(lines, key=lambda each: each[:2]):
            if kind == 0:
                live.remove(Event(line["type"], torch.tensor(line["units"]), 0.0, 1.0))
            else:
                kept = choose_kept(live, Widths(**line["after"]))
                live = cut_live(live, kept)
                masks = Live(*(names[key] for key in ("hidden", "layers", "ffn", "kv", "query")))
                names = cut_live(masks, kept).tensors()
    except (AssertionError, IndexError, KeyError, RuntimeError) as error:
        raise UsageError(f"events.jsonl and compactions.jsonl do not fit each other: {error}") from error
    for key, mask in alive.tensors().items():
        mask.zero_()
        mask.view(-1)[names[key][live.tensors()[key]]] = True
    return {
        kind: [frozenset(row.nonzero().flatten().tolist()) for row in alive.units(kind)]
        for kind in (ATTENTION, ATTENTION_QUERY, FFN_TYPE, STEM, DEPTH)
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
