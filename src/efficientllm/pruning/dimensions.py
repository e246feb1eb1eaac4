"""The one table of prunable dimensions: whatever is particular to a pruning type stands in its row, all else loops.

A *dimension* is a width of the model that pruning may narrow. Its units lie in rows: one row for the whole model, or
one for every unit of the dimension that it lies *within* (an FFN channel lies within a layer, a query head within a KV
head). Masks, scores and kept units are therefore tensors of shape (units of all outer dimensions..., own units).

A new pruning type is a row here, and a family whose weights carry its axis label (models/).
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS, HIDDEN, KV, QUERY, FFN = "layers", "hidden", "kv", "query", "ffn"
EXPERT, EXPERT_FFN = "expert", "expert_ffn"  # the names of the dimensions, and of the types that narrow them
ATTENTION, ATTENTION_QUERY, FFN_TYPE, STEM, DEPTH = "attention", "attention_query", "ffn", "stem", "depth"
# Tokens are no dimension: a zeroed row of the LM head is not gone, since its logit would be 0. They fall at once, where
# a run is cut, beside the types of the table (training/vocabulary.py).
VOCAB = "vocab"


@dataclass(frozen=True)
class Dimension:
    """One row of the table.

    name: of its masks, and the label of the tensor axis that its units lie along. type: the pruning type that narrows
    it. width: its name in Widths, in a target, in records and in floors. within: the dimension each of whose units has
    units of this one; None: the model has. per_head: every unit has head_dim entries along the axis, else one.
    apart: a weight with its label has the dimension that it lies within along dimension 0, and the units of one of
    those along its own; else one axis runs over all units of all. floored: no fewer may stay than a token uses.
    held: a gradient still reaches the weights of a dead unit, so that it must be cleared at every step. default:
    whether it falls where a recipe does not say what may. label: for people.
    """

    name: str
    type: str
    width: str
    label: str
    within: str | None = None
    per_head: bool = False
    apart: bool = False
    floored: bool = False
    held: bool = False
    default: bool = True

    @property
    def chain(self) -> tuple[str, ...]:
        """Names of the dimensions that its mask is indexed by, from the outermost to its own."""
        return (*(DIMENSIONS[self.within].chain if self.within else ()), self.name)

    @property
    def outer(self) -> tuple[str, ...]:
        """The chain without the dimension itself: what a row of its units is counted by."""
        return self.chain[:-1]


# In the order in which ties between pruning types are broken.
_TABLE = (
    Dimension(KV, ATTENTION, "kv_heads", "KV groups", within=LAYERS, per_head=True),
    Dimension(QUERY, ATTENTION_QUERY, "queries_per_kv", "query heads", within=KV, per_head=True, held=True),
    Dimension(FFN, FFN_TYPE, "intermediate", "FFN channels", within=LAYERS),
    Dimension(EXPERT, EXPERT, "experts", "experts", within=LAYERS, floored=True),
    Dimension(EXPERT_FFN, EXPERT_FFN, "expert_intermediate", "expert FFN channels", within=EXPERT, apart=True),
    Dimension(HIDDEN, STEM, "hidden", "residual channels"),
    Dimension(LAYERS, DEPTH, "layers", "layers", held=True, default=False),
)
DIMENSIONS: dict[str, Dimension] = {}


def add_dimension(dimension: Dimension) -> None:
    """Puts a row into the table. Raises ValueError for a name, type or width that is taken, or an unknown `within`."""
    for key in ("name", "type", "width"):
        if any(getattr(dimension, key) == getattr(other, key) for other in DIMENSIONS.values()):
            raise ValueError(f"the {key} '{getattr(dimension, key)}' is another dimension's already")
    if dimension.within and dimension.within not in {*DIMENSIONS, *(row.name for row in _TABLE)}:
        raise ValueError(f"dimension '{dimension.name}' lies within '{dimension.within}', which there is not")
    DIMENSIONS[dimension.name] = dimension


for _row in _TABLE:
    add_dimension(_row)
EXPERT_TYPES = (EXPERT, EXPERT_FFN)  # a mixture of experts has them in place of ffn
PRUNING_TYPES = tuple(row.type for row in _TABLE if row.type not in EXPERT_TYPES)  # of a dense decoder
DEFAULT_TYPES = tuple(row.type for row in _TABLE if row.default and row.type in PRUNING_TYPES)


def of_type(pruning_type: str) -> Dimension:
    """The dimension that a pruning type narrows. Raises ValueError for a word that is no pruning type."""
    for dimension in DIMENSIONS.values():
        if dimension.type == pruning_type:
            return dimension
    known = ", ".join(dimension.type for dimension in DIMENSIONS.values())
    raise ValueError(f"'{pruning_type}' is no pruning type here; choose among {known}")
