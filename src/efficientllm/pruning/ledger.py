"""What a run has spent, by what it was for."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields


@dataclass
class Ledger:
    """Floating-point operations: of the student's steps, of looks at the gradient or the inputs for scores' sake (or
    at text in two vocabularies), of correction, of the teacher. Whole numbers, exact while they are
    Python's own; NaN where a run began before they were counted."""

    steps: float = 0
    looks: float = 0
    correction: float = 0
    teacher: float = 0

    @property
    def total(self) -> float:
        total: float = sum(astuple(self))
        return total

    def add(self, other: Ledger) -> None:
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
