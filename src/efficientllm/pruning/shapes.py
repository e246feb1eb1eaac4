"""Shapes that a person would choose."""

from __future__ import annotations

from efficientllm.pruning.groups import Space, Widths


def proportional_widths(space: Space, parameters: int) -> Widths:
    """The widest shape of at most `parameters` whose hidden, heads and FFN keep the source's proportions.

    Heads are whole, groups of query heads stay as large, layers stay. Raises ValueError where nothing fits.
    """
    source, best = space.widths, None
    for hidden in range(1, source.hidden + 1):
        scale = hidden / source.hidden
        kv_heads = max(1, round(scale * source.kv_heads))
        heads, ffn = kv_heads * source.queries_per_kv, max(1, round(scale * source.intermediate))
        widths = Widths(source.layers, hidden, heads, kv_heads, ffn)
        if space.num_params(widths) <= parameters:
            best = widths
    if best is None:
        raise ValueError(f"no proportional shape has at most {parameters:,} parameters: raise the target")
    return best
