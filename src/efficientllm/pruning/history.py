"""Which unit of the source fell when, replayed from a run's events and compactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientllm.pruning.groups import Removal
from efficientllm.pruning.live import Live
from efficientllm.pruning.surgery import choose_kept, cut_live
from efficientllm.pruning.widths import Widths

KEPT = torch.inf


def fallen_at(
    source: Widths, events: Sequence[Mapping[str, Any]], compactions: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Pruning type -> fp64 (rows, units) in the source's own numbering: tokens seen when a unit fell, inf if it stayed.

    events, compactions: lines of the journals, events with units counted in the widths allocated at their step. A
    query head falls with its KV group, and everything in a layer with the layer. Rows of attention_query are layers
    times KV groups. Raises ValueError where events and compactions do not fit each other.
    """
    live = Live.full(source)
    names = Live({key: torch.arange(mask.numel()).view(mask.shape) for key, mask in live.items()})
    when = {key: torch.full(mask.shape, KEPT, dtype=torch.float64) for key, mask in live.items()}
    # Within a step events come first: a compaction cuts what they have zeroed.
    lines = [(line["step"], 0, line) for line in events] + [(line["step"], 1, line) for line in compactions]
    try:
        for _, kind, line in sorted(lines, key=lambda each: each[:2]):
            if kind:
                kept = choose_kept(live, Widths(**line["after"]))
                live = cut_live(live, kept)
                names = cut_live(names, kept)
                continue
            before = {key: mask.clone() for key, mask in live.items()}
            live.remove(Removal(line["type"], torch.tensor(line["units"])))
            for key, mask in live.items():
                when[key].view(-1)[names[key][before[key] & ~mask]] = float(line["tokens"])
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"events and compactions do not fit each other: {error}") from error
    return {kind: Live(when).units(kind) for kind in source.types()}
