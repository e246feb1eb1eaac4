"""The shape of a model: one number a dimension."""

from __future__ import annotations

from collections.abc import Mapping

from efficientllm.pruning.dimensions import DIMENSIONS, of_type


class Widths:
    """What is left: one number a dimension for the whole model (layers are uniform).

    layers, hidden, heads (query heads of a layer), kv_heads, intermediate (None: the FFN is a mixture of experts);
    others: widths of further dimensions by name (dimensions.py). Immutable, hashable. The numbers may be int64 tensors
    of one shape, for many shapes at once.
    """

    __slots__ = ("_counts",)

    def __init__(
        self, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int | None = None, **others: int
    ) -> None:
        self._counts: dict[str, int] = {
            "layers": layers,
            "hidden": hidden,
            "kv_heads": kv_heads,
            "queries_per_kv": heads // kv_heads,
        }
        self._counts |= others if intermediate is None else {"intermediate": intermediate, **others}

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Widths:
        """From the units of every dimension by the name of its width (`queries_per_kv` in place of `heads`)."""
        widths = cls.__new__(cls)
        widths._counts = dict(counts)
        return widths

    def __getitem__(self, width: str) -> int:
        """Units of one dimension in each of its rows, by the name of its width."""
        return self._counts[width]

    @property
    def layers(self) -> int:
        return self._counts["layers"]

    @property
    def hidden(self) -> int:
        return self._counts["hidden"]

    @property
    def kv_heads(self) -> int:
        return self._counts["kv_heads"]

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head (1 in multi-head attention)."""
        return self._counts["queries_per_kv"]

    @property
    def heads(self) -> int:
        return self.kv_heads * self.queries_per_kv

    @property
    def intermediate(self) -> int:
        return self._counts["intermediate"]

    def counts(self) -> dict[str, int]:
        """Units of every dimension by the name of its width."""
        return dict(self._counts)

    def types(self) -> tuple[str, ...]:
        """The pruning types of a model that has these widths, in the order of the table."""
        return tuple(row.type for row in DIMENSIONS.values() if row.width in self._counts)

    def record(self) -> dict[str, int]:
        """As JSON has them, with `heads`; `Widths(**record)` reads it."""
        named = {"layers": self.layers, "hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads}
        rest = {name: count for name, count in self._counts.items() if name not in {*named, "queries_per_kv"}}
        return named | rest

    def changed(self, **fields: int) -> Widths:
        """These widths with some of the numbers of their record replaced."""
        return Widths(**(self.record() | fields))

    def after(self, pruning_type: str, events: int = 1) -> Widths:
        """The widths once `events` events of one type have taken their units."""
        width = of_type(pruning_type).width
        return Widths.of(self._counts | {width: self._counts[width] - events})

    def count(self, pruning_type: str) -> int:
        """Units of one type left in each of its rows."""
        return self._counts[of_type(pruning_type).width]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Widths) and self._counts == other._counts

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._counts.items())))

    def __repr__(self) -> str:
        return f"Widths({', '.join(f'{name}={count}' for name, count in self.record().items())})"

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        ffn = "{experts} experts of {expert_intermediate}" if "experts" in self._counts else "FFN {intermediate}"
        return f"{self.layers} layers, hidden {self.hidden}, heads {heads}, {ffn.format(**self._counts)}"
