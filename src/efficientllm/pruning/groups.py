"""What falls together: axes, pruning types, units, groups (the paper's minimal parameter groups).

Every weight of a decoder is described by the *axes* of its dimensions, one word each:

=========  ===========================  =======================================
axis       length                       entries, in order
=========  ===========================  =======================================
hidden     hidden                       residual channels (shared by the whole model)
query      heads * head_dim             per layer: KV head, query head of it, channel
kv         kv_heads * head_dim          per layer: KV head, channel
ffn        intermediate                 per layer: FFN channels
=========  ===========================  =======================================

Everything else follows from these labels: which slices fall with a unit, how many parameters a shape has, how a
tensor is cut. A *pruning type* is a matrix of units, (rows, units); an event takes one live unit of each live row:

===============  ============================  ====================================  ================
type             row                           unit                                  axes it cuts
===============  ============================  ====================================  ================
attention        layer                         KV head with its queries (MHA: head)  query, kv
attention_query  layer and KV head             one query head of it                  query
ffn              layer                         FFN channel                           ffn
stem             the model (a single row)      residual channel                      hidden
depth            the model (a single row)      layer                                 (all of its weights)
===============  ============================  ====================================  ================

A layer whose weights are zero adds nothing to the stem: it is the identity until compaction drops it.

Source: EfficientLLM (ACL 2026), the pruning space; GQA units and depth are ours.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

HIDDEN, QUERY, KV, FFN = "hidden", "query", "kv", "ffn"
ATTENTION, ATTENTION_QUERY, FFN_TYPE, STEM, DEPTH = "attention", "attention_query", "ffn", "stem", "depth"
PRUNING_TYPES = (ATTENTION, ATTENTION_QUERY, FFN_TYPE, STEM, DEPTH)
DEFAULT_TYPES = PRUNING_TYPES[:-1]
ONE_ROW = (STEM, DEPTH)  # types whose units belong to the model, not to a layer


def unknown(pruning_type: str) -> ValueError:
    """For a word that is no pruning type, or one that the caller has no units of."""
    return ValueError(f"'{pruning_type}' is no pruning type here; choose among {', '.join(PRUNING_TYPES)}")


@dataclass(frozen=True)
class Widths:
    """What is left: one number a dimension for the whole model (layers are uniform)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head (1 in multi-head attention)."""
        return self.heads // self.kv_heads

    def after(self, pruning_type: str, events: int = 1) -> Widths:
        """The widths once `events` events of one type have taken their units."""
        if pruning_type == ATTENTION:
            kv_heads = self.kv_heads - events
            return replace(self, kv_heads=kv_heads, heads=kv_heads * self.queries_per_kv)
        if pruning_type == ATTENTION_QUERY:
            return replace(self, heads=self.heads - events * self.kv_heads)
        if pruning_type == FFN_TYPE:
            return replace(self, intermediate=self.intermediate - events)
        if pruning_type == DEPTH:
            return replace(self, layers=self.layers - events)
        if pruning_type == STEM:
            return replace(self, hidden=self.hidden - events)
        raise unknown(pruning_type)

    def count(self, pruning_type: str) -> int:
        """Units of one type left in each of its rows."""
        return {
            ATTENTION: self.kv_heads,
            ATTENTION_QUERY: self.queries_per_kv,
            FFN_TYPE: self.intermediate,
            STEM: self.hidden,
            DEPTH: self.layers,
        }[pruning_type]

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.layers} layers, hidden {self.hidden}, heads {heads}, FFN {self.intermediate}"


@dataclass(frozen=True)
class ParamSpec:
    """One weight: its fully qualified name, the axis of each dimension (an int is a fixed length), its layer."""

    name: str
    axes: tuple[str | int, ...]
    layer: int | None = None

    def name_in(self, layer: int) -> str:
        """The name of the same weight of another layer."""
        return self.name.replace(f".{self.layer}.", f".{layer}.", 1)


@dataclass(frozen=True)
class Slice:
    """The part of one weight that falls with a unit: `indices` (int64, 1-D) along dimension `dim`."""

    name: str
    dim: int
    indices: Tensor


@dataclass(frozen=True)
class Space:
    """A model as pruning sees it.

    embeddings: weights that are looked up by token rather than multiplied with an input.
    stem_gains: norm gains over the hidden axis. Compaction from D to d hidden channels multiplies them by sqrt(D/d).
    norm_inputs: weights whose output is normalised by a norm that shares the stem's epsilon without lying on the
        hidden axis (Qwen3's q and k); they are multiplied alike, so that a changed epsilon changes nothing.
    """

    params: tuple[ParamSpec, ...]
    widths: Widths
    head_dim: int
    embeddings: frozenset[str] = frozenset()
    stem_gains: frozenset[str] = frozenset()
    norm_inputs: frozenset[str] = frozenset()

    def axis_length(self, axis: str | int, widths: Any) -> Any:
        """Length of an axis; elementwise where the fields of `widths` are tensors."""
        if isinstance(axis, int):
            return axis
        if axis == HIDDEN:
            return widths.hidden
        if axis == FFN:
            return widths.intermediate
        assert axis in (QUERY, KV), axis
        return (widths.heads if axis == QUERY else widths.kv_heads) * self.head_dim

    def shape(self, spec: ParamSpec, widths: Widths) -> tuple[int, ...]:
        return tuple(self.axis_length(axis, widths) for axis in spec.axes)

    def num_params(self, widths: Any | None = None) -> Any:
        """Parameters of the model at `widths` (default: its own); elementwise on int64 tensors."""
        widths = self.widths if widths is None else widths
        kinds = Counter((spec.layer is not None, spec.axes) for spec in self.params)
        total: Any = 0
        for (layered, axes), number in kinds.items():
            copies = number // self.widths.layers * widths.layers if layered else number
            total = total + copies * math.prod([self.axis_length(axis, widths) for axis in axes])
        return total

    def event_cost(self, pruning_type: str, widths: Widths, events: int = 1) -> int:
        """Parameters that `events` events of one type remove from a model of these widths."""
        return int(self.num_params(widths) - self.num_params(widths.after(pruning_type, events)))


@dataclass(frozen=True)
class Cut:
    """What falls in one pruning act: a type and one unit of each of its live rows.

    units: int64 (rows,), the unit taken in each row, -1 where the row is dead already (its KV head is gone).
    """

    type: str
    units: Tensor


@dataclass(frozen=True)
class Event(Cut):
    """A cut, weighed. saliency: predicted loss increase in nats, calibrated. cost: the price that it is weighed by,
    what it saves in the run's cost (of a measured one the mean along its type's way, selection.py)."""

    saliency: float
    cost: float

    @property
    def damage(self) -> float:
        """Saliency per unit of cost, the currency in which types are compared; infinite where nothing is saved."""
        return self.saliency / self.cost if self.cost > 0 else math.inf


class Live:
    """Which units of a model are still there: bool tensors on the CPU.

    hidden (D,), layers (L,), ffn (L, F), kv (L, K), query (L, K, Q). A query head of a dead KV head is dead, and so
    is everything in a dead layer.
    """

    def __init__(self, hidden: Tensor, layers: Tensor, ffn: Tensor, kv: Tensor, query: Tensor) -> None:
        self.hidden, self.layers, self.ffn, self.kv, self.query = hidden, layers, ffn, kv, query

    @classmethod
    def full(cls, widths: Widths) -> Live:
        layers, kv, queries = widths.layers, widths.kv_heads, widths.queries_per_kv
        shapes = ((widths.hidden,), (layers,), (layers, widths.intermediate), (layers, kv), (layers, kv, queries))
        return cls(*(torch.ones(shape, dtype=torch.bool) for shape in shapes))

    def copy(self) -> Live:
        return Live(**{name: mask.clone() for name, mask in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "layers": self.layers, "ffn": self.ffn, "kv": self.kv, "query": self.query}

    def widths(self) -> Widths:
        """Widths of what is live; uniform over layers by construction."""
        first = int(self.layers.int().argmax())
        kv_heads = int(self.kv[first].sum())
        heads = int(self.query[first].sum())
        counts = int(self.hidden.sum()), heads, kv_heads, int(self.ffn[first].sum())
        return Widths(int(self.layers.sum()), *counts)

    def all_live(self) -> bool:
        return all(bool(mask.all()) for mask in self.tensors().values())

    def units(self, pruning_type: str) -> Tensor:
        """Live units of one type, bool (rows, units)."""
        if pruning_type == ATTENTION:
            return self.kv
        if pruning_type == ATTENTION_QUERY:
            return self.query.flatten(0, 1)
        if pruning_type == DEPTH:
            return self.layers[None]
        if pruning_type == FFN_TYPE:
            return self.ffn
        if pruning_type == STEM:
            return self.hidden[None]
        raise unknown(pruning_type)

    def entries(self, axis: str, layer: int, head_dim: int) -> Tensor:
        """Live entries along one axis of one layer, bool (length,)."""
        if axis == HIDDEN:
            return self.hidden
        if axis == FFN:
            return self.ffn[layer]
        assert axis in (QUERY, KV), axis
        heads = self.kv[layer] if axis == KV else self.query[layer].flatten()
        return heads.repeat_interleave(head_dim)

    def remove(self, event: Cut) -> None:
        """Marks the units of a cut as dead. Raises AssertionError if one of them was dead before."""
        units = self.units(event.type)
        rows = (event.units >= 0).nonzero().flatten()
        taken = event.units[rows]
        assert bool(units[rows, taken].all()), f"{event.type} event takes a unit that is dead already"
        units[rows, taken] = False
        if event.type == ATTENTION:
            self.query[rows, taken] = False
        if event.type == DEPTH:
            for mask in (self.ffn, self.kv, self.query):
                mask[taken] = False
