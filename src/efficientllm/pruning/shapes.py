"""Shapes that a person would choose."""

from __future__ import annotations

from collections.abc import Callable

from efficientllm.pruning.groups import Space, Widths


def proportional_widths(space: Space, limit: float, size: Callable[[Widths], float] | None = None) -> Widths:
    """The widest shape of at most `limit` whose hidden, heads and FFN keep the source's proportions.

    size: what the limit counts, such as a cost of pruning/costs.py; default: parameters. Heads are whole, groups of
    query heads stay as large, layers stay. Raises ValueError where nothing fits.
    """
    size = size or space.num_params
    source = space.widths
    for hidden in range(source.hidden, 0, -1):
        scale = hidden / source.hidden
        kv_heads = max(1, round(scale * source.kv_heads))
        heads, ffn = kv_heads * source.queries_per_kv, max(1, round(scale * source.intermediate))
        widths = Widths(source.layers, hidden, heads, kv_heads, ffn)
        if size(widths) <= limit:
            return widths
    raise ValueError(
        f"no proportional shape has at most {limit:,} {getattr(size, 'unit', 'parameters')}: raise the target"
    )
