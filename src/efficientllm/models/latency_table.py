"""Latency over a grid of widths, measured once on the device (`efficientllm bench MODEL --table FILE`), as a JSON file.

    {"format": 1, "measured_on": {...}, "grid": {axis: [widths]}, "seconds": [...], "held_out": [...], ...}

seconds: of one whole sequence, in the grid's row-major order over pruning.costs.TABLE_AXES. Whatever else stands in the
file is for people.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from efficientllm.errors import UsageError
from efficientllm.models.space import head_dim_of
from efficientllm.pruning.costs import TABLE_AXES, TableCost
from efficientllm.pruning.groups import Widths
from efficientllm.pruning.monotone import smoothed

FORMAT = 1


@dataclass(frozen=True)
class MeasuredOn:
    """What a table is true of. prompt, generate: tokens of the sequence; batch: sequences at once; machine: the
    processor or GPU, and the versions that computed."""

    family: str
    head_dim: int
    vocabulary: int
    dtype: str
    device: str
    threads: int
    prompt: int
    generate: int
    batch: int
    machine: dict[str, str]


@dataclass(frozen=True)
class LatencyTable:
    """grid: the widths measured, rising, of each of TABLE_AXES. seconds: medians as measured, in row-major order."""

    measured_on: MeasuredOn
    grid: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]

    def cost(self) -> TableCost:
        """The table as a cost, smoothed so that it never falls when a width grows."""
        shape = [len(levels) for levels in self.grid]
        values = torch.tensor(self.seconds, dtype=torch.float64).view(shape)
        content = json.dumps([asdict(self.measured_on), self.grid, self.seconds])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return TableCost(self.grid, smoothed(self.grid, values), f"latency by table {digest}")

    def check(self, path: str, config: PretrainedConfig) -> None:
        """Raises UsageError where the table was measured for another kind of model than this source."""
        there = self.measured_on
        for what, measured, own in (
            ("family", there.family, config.model_type),
            ("head_dim", there.head_dim, head_dim_of(config)),
            ("vocabulary", there.vocabulary, config.vocab_size),
        ):
            if measured != own:
                raise UsageError(
                    f"prune.latency_table {path} was measured for {what} {measured}, but the source has {own}; measure "
                    "one with `efficientllm bench SOURCE --table FILE`"
                )

    def check_range(self, path: str, least: Widths, most: Widths) -> None:
        """Raises UsageError where shapes between these widths lie outside the grid."""
        for axis, levels in zip(TABLE_AXES, self.grid, strict=True):
            low, high = getattr(least, axis), getattr(most, axis)
            if low < levels[0] or high > levels[-1]:
                measured = f"{axis} {levels[0]}" if len(levels) == 1 else f"{axis} {levels[0]} to {levels[-1]}"
                mend = "leave depth out of prune.types" if axis == "layers" else "raise prune.floors"
                mend = f"{mend}, or measure a wider one" if high <= levels[-1] else "measure one of this source"
                raise UsageError(
                    f"prune.latency_table {path} covers {measured}, but the recipe may ask for {low} to {high}; {mend}"
                )


def table_content(table: LatencyTable, more: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the file. more: further facts for people."""
    grid = dict(zip(TABLE_AXES, map(list, table.grid), strict=True))
    return {
        "format": FORMAT,
        "measured_on": asdict(table.measured_on),
        "grid": grid,
        "seconds": list(table.seconds),
    } | dict(more)


def load_table(path: str) -> LatencyTable:
    """Raises UsageError where there is no such file, or it holds no table."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        grid = tuple(tuple(map(int, content["grid"][axis])) for axis in TABLE_AXES)
        seconds = tuple(map(float, content["seconds"]))
        table = LatencyTable(MeasuredOn(**content["measured_on"]), grid, seconds)
        if not all(levels and all(a < b for a, b in pairwise(levels)) for levels in grid):
            raise ValueError("its grid does not rise")
        if len(seconds) != math.prod(map(len, grid)) or not all(0 < each < math.inf for each in seconds):
            raise ValueError("its seconds do not fill its grid")
    except FileNotFoundError:
        raise UsageError(
            f"there is no prune.latency_table {path}; measure one with `efficientllm bench MODEL --table {path}`"
        ) from None
    except KeyError as error:
        raise UsageError(f"prune.latency_table {path} is no table of latencies (it has no {error})") from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"prune.latency_table {path} is no table of latencies ({error})") from None
    return table
