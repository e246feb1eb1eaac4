"""What falls together: axes, pruning types, units, groups (the paper's minimal parameter group).

Every weight of a decoder is described by the *axes* of its dimensions, one word each:

=========  ===========================  =======================================
axis       length                       entries, in order
=========  ===========================  =======================================
hidden     hidden                       residual channels (shared by the whole model)
query      heads * head_dim             per layer: KV head, query head of it, channel
kv         kv_heads * head_dim          per layer: KV head, channel
ffn        intermediate                 per layer: FFN channels
expert     experts                      per layer: experts
expert_ffn expert_intermediate          per layer and expert: its FFN channels
=========  ===========================  =======================================

Fused weights have axes that stand one after the other along one dimension, a tuple of labels: (query, kv, kv) are the
rows of a fused qkv, (ffn, ffn) those of a fused gate_up.

Everything else follows from these labels: which slices fall with a unit, how many parameters a shape has, how a
tensor is cut. Each label is a row of the table of dimensions (dimensions.py). A *pruning type* is a matrix of units,
(rows, units); an event takes one live unit of each live row:

===============  ============================  ====================================  ================
type             row                           unit                                  axes it cuts
===============  ============================  ====================================  ================
attention        layer                         KV head with its queries (MHA: head)  query, kv
attention_query  layer and KV head             one query head of it                  query
ffn              layer                         FFN channel                           ffn
expert           layer                         expert, with its row of the router    expert
expert_ffn       layer and expert              FFN channel of it                     expert_ffn
stem             the model (a single row)      residual channel                      hidden
depth            the model (a single row)      layer                                 (all of its weights)
===============  ============================  ====================================  ================

A layer whose weights are zero adds nothing to the stem: it is the identity until compaction drops it. An expert whose
row of the router is zero is never chosen (models/experts.py).

The experts of a layer are one weight: dimension 0 runs over them, another over the FFN channels of each, which are its
own choice. Such an axis is *apart* (dimensions.py): its entries are told together with those along dimension 0.

Source: EfficientLLM (ACL 2026), the pruning space; GQA units and depth are ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS, LAYERS, of_type
from efficientllm.pruning.widths import Widths

Axis = str | int | tuple[str, ...]  # of one dimension: a label, a fixed length, or labels one after the other

MULTIPLE = "multiple"


def labels(axis: Axis) -> tuple[str, ...]:
    """The labels of an axis in order; none of a fixed length."""
    return axis if isinstance(axis, tuple) else () if isinstance(axis, int) else (axis,)


@dataclass(frozen=True)
class ParamSpec:
    """One weight: its fully qualified name, the axis of each dimension, its layer."""

    name: str
    axes: tuple[Axis, ...]
    layer: int | None = None

    @property
    def inputs(self) -> Axis:
        """The axis of what a matrix is multiplied with."""
        return self.axes[-1]

    def is_apart(self, dim: int) -> bool:
        """Whether the units along a dimension are those of one unit along dimension 0."""
        return any(DIMENSIONS[label].apart for label in labels(self.axes[dim]))

    def name_in(self, layer: int) -> str:
        """The name of the same weight of another layer."""
        return self.name.replace(f".{self.layer}.", f".{layer}.", 1)


@dataclass(frozen=True)
class Slice:
    """The part of one weight that falls with a unit: `indices` (int64, 1-D) along dimension `dim`. rows: where they are
    not the same along dimension 0, the place there of each of them."""

    name: str
    dim: int
    indices: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Space:
    """A model as pruning sees it; the same only as itself, so that what follows from it can be kept by it.

    embeddings: weights that are looked up by token rather than multiplied with an input.
    scaling: what compaction multiplies a weight by, as axes with powers: the square root of the product of
        (length before / length after) ** power over them (models/space.py derives them from what the norms run over).
    offsets: what a norm adds to its weight to get the gain, by the weight's name; 0 for those that are not here.
    closing: gains of norms whose outputs are what a layer adds to the stem; none: its linear layers add theirs.
    hidden_rule: what a model that is to be saved needs of the hidden width: MULTIPLE of the heads, or a number that
        hidden // heads is; None: nothing (shapes.py).
    eager: attention's scores stand in memory, and its backward pass does not compute them anew.
    experts_per_token: of a mixture of experts. fixed: pruning types that do not fall, and why, as the end of a
        sentence.
    """

    params: tuple[ParamSpec, ...]
    widths: Widths
    head_dim: int
    embeddings: frozenset[str] = frozenset()
    scaling: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    offsets: Mapping[str, float] = field(default_factory=dict)
    closing: frozenset[str] = frozenset()
    hidden_rule: str | int | None = None
    eager: bool = False
    experts_per_token: int = 1
    fixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def types(self) -> tuple[str, ...]:
        """The pruning types that may fall, in the order of the table."""
        return tuple(name for name in self.widths.types() if name not in self.fixed)

    def least(self, pruning_type: str) -> int:
        """Units of a type that every row keeps, whatever the floors: the experts that a token uses, else one."""
        return self.experts_per_token if of_type(pruning_type).floored else 1

    def axis_length(self, axis: Axis, widths: Any) -> Any:
        """Length of an axis; elementwise where the fields of `widths` are tensors."""
        if isinstance(axis, int):
            return axis
        if isinstance(axis, tuple):
            return sum(self.axis_length(part, widths) for part in axis)
        dimension = DIMENSIONS[axis]
        chain = (axis,) if dimension.apart else dimension.chain
        inner = [DIMENSIONS[name].width for name in chain if name != LAYERS]
        return math.prod([widths[width] for width in inner], start=self.head_dim if dimension.per_head else 1)

    def shape(self, spec: ParamSpec, widths: Widths) -> tuple[int, ...]:
        return tuple(self.axis_length(axis, widths) for axis in spec.axes)

    @cached_property
    def _kinds(self) -> Counter[tuple[bool, tuple[Axis, ...]]]:
        """How many weights lie along the same axes, those of layers apart."""
        return Counter((spec.layer is not None, spec.axes) for spec in self.params)

    def num_params(self, widths: Any | None = None, *, active: bool = False) -> Any:
        """Parameters of the model at `widths` (default: its own); elementwise on int64 tensors. active: of those the
        ones that one token computes with."""
        widths = self.widths if widths is None else widths
        length = self.active_length if active else lambda axes, dim, at: self.axis_length(axes[dim], at)
        total: Any = 0
        for (layered, axes), number in self._kinds.items():
            copies = number // self.widths.layers * widths.layers if layered else number
            total = total + copies * math.prod([length(axes, dim, widths) for dim in range(len(axes))])
        return total

    def copies(self, axis: Axis) -> int:
        """How many entries of an axis one token has in a layer: of an expert's one for each expert that it uses."""
        return self.experts_per_token if any(DIMENSIONS[label].apart for label in labels(axis)) else 1

    def active_length(self, axes: Sequence[Axis], dim: int, widths: Any) -> Any:
        """Entries along a dimension of a weight that one token computes with: of experts those that it uses."""
        is_expert = len(axes) == 3 and dim == 0
        return self.experts_per_token if is_expert else self.axis_length(axes[dim], widths)

    def event_cost(self, pruning_type: str, widths: Widths, events: int = 1) -> int:
        """Parameters that `events` events of one type remove from a model of these widths."""
        return int(self.num_params(widths) - self.num_params(widths.after(pruning_type, events)))


@dataclass(frozen=True)
class Removal:
    """What falls in one pruning act: a type and one unit of each of its live rows.

    units: int64 (rows,), the unit taken in each row, -1 where the row is dead already (its KV head is gone).
    """

    type: str
    units: Tensor


@dataclass(frozen=True)
class Event(Removal):
    """A removal, weighed. saliency: predicted loss increase, in nats where the scores are. cost: the price that it is
    weighed by, what it saves in the run's cost (of a measured one the mean along its type's way, selection.py)."""

    saliency: float
    cost: float

    @property
    def damage(self) -> float:
        """Saliency per unit of cost, the currency in which types are compared; infinite where nothing is saved."""
        return self.saliency / self.cost if self.cost > 0 else math.inf
