"""Latency over a grid of widths, measured once on the device (`efficientllm bench MODEL --table FILE`), as a JSON file.

    {"format": 1, "measured_on": {...}, "grid": {axis: [widths]}, "seconds": [...], "held_out": [...], ...}

seconds: of one whole sequence, in the grid's row-major order over pruning.costs.TABLE_AXES. Whatever else stands in the
file is for people.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
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
from efficientllm.pruning.widths import Widths

FORMAT = 1
MOST_ERROR = 0.1  # median over the shapes held out: a table that is further off is said to be
DTYPES = ("float32", "bfloat16", "float16")


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

    def __post_init__(self) -> None:
        """Raises ValueError for a field that says nothing a table can be checked by."""
        for name in ("head_dim", "vocabulary", "threads", "prompt", "generate", "batch"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"its measured_on.{name} is {value!r}, not a whole number above 0")
        if not isinstance(self.family, str):
            raise ValueError(f"its measured_on.family is {self.family!r}, not a name")
        if self.dtype not in DTYPES:
            raise ValueError(f"its measured_on.dtype is {self.dtype!r}, none of {', '.join(DTYPES)}")
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"its measured_on.device is {self.device!r}, neither cpu nor cuda")
        if not isinstance(self.machine, dict):
            raise ValueError(f"its measured_on.machine is {self.machine!r}, not names with their values")


def family_of(config: PretrainedConfig) -> str:
    """The name under which latencies are the same: a Mistral without a window computes what a Llama does."""
    windowless = config.model_type == "mistral" and getattr(config, "sliding_window", None) is None
    return "llama" if windowless else str(config.model_type)


@dataclass(frozen=True)
class LatencyTable:
    """grid: the widths measured, rising, of each of TABLE_AXES. seconds: medians as measured, in row-major order.
    median_error: of the table at shapes held out of it, as a share; None where it is not known."""

    measured_on: MeasuredOn
    grid: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    median_error: float | None = None

    def cost(self) -> TableCost:
        """The table as a cost, smoothed so that it never falls when a width grows."""
        from efficientllm.models.latency_fit import smoothed  # and with it scipy, which no other run needs

        shape = [len(levels) for levels in self.grid]
        values = torch.tensor(self.seconds, dtype=torch.float64).view(shape)
        content = json.dumps([asdict(self.measured_on), self.grid, self.seconds])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return TableCost(self.grid, smoothed(self.grid, values), f"latency by table {digest}")

    def about(self, path: str) -> str:
        """One line on what the table was measured on, and how far it is off."""
        on, error = self.measured_on, self.median_error
        known = "error not known" if error is None else f"median error {error:.1%}"
        return (
            f"latency by {path}: {on.dtype} on {on.device} ({on.machine.get('device', 'machine not named')}), "
            f"{on.prompt}+{on.generate} tokens, batch {on.batch}, {known}{off_by(error)}"
        )

    def check(self, path: str, config: PretrainedConfig) -> None:
        """Raises UsageError where the table was measured for another kind of model than this source."""
        there, mend = self.measured_on, "measure one with `efficientllm bench SOURCE --table FILE`"
        same_family = there.family in (config.model_type, family_of(config))
        for what, measured, own in (
            ("family", config.model_type if same_family else there.family, config.model_type),
            ("head_dim", there.head_dim, head_dim_of(config)),
            ("vocabulary", there.vocabulary, config.vocab_size),
        ):
            if measured != own:
                raise UsageError(
                    f"prune.latency_table {path} was measured for {what} {measured}, but the source has {own}; {mend}"
                )

    def check_range(self, path: str, least: Widths, most: Widths) -> None:
        """Raises UsageError where shapes between these widths lie outside the grid."""
        for axis, levels in zip(TABLE_AXES, self.grid, strict=True):
            low, high = getattr(least, axis), getattr(most, axis)
            if low < levels[0] or high > levels[-1]:
                measured = f"{axis} {levels[0]}" if len(levels) == 1 else f"{axis} {levels[0]} to {levels[-1]}"
                mend = "leave depth out of prune.types" if axis == "layers" else "raise prune.floors"
                pruned = low < high <= levels[-1]  # else no floor is at fault, but the table
                mend = f"{mend}, or measure a wider one" if pruned else "measure one of this source"
                raise UsageError(
                    f"prune.latency_table {path} covers {measured}, but the recipe may ask for {low} to {high}; {mend}"
                )


def off_by(error: float | None) -> str:
    """What to say behind a table's median error: nothing where it is small enough, else what that means and mends."""
    if error is None or error <= MOST_ERROR:
        return ""
    return (
        f", above {MOST_ERROR:.0%}: shapes that are nearer to one another than that are not told apart; measure it "
        "again with more --repeats or --levels"
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
        error = content.get("median_error")
        table = LatencyTable(
            MeasuredOn(**content["measured_on"]), grid, seconds, None if error is None else float(error)
        )
        if not all(levels and all(a < b for a, b in pairwise(levels)) for levels in grid):
            raise ValueError("its grid does not rise")
        if len(seconds) != math.prod(map(len, grid)) or not all(0 < each < math.inf for each in seconds):
            raise ValueError("its seconds do not fill its grid")
        if not 0 <= (table.median_error or 0.0) < math.inf:
            raise ValueError(f"its median_error is {table.median_error}")
    except FileNotFoundError:
        raise UsageError(
            f"there is no prune.latency_table {path}; measure one with `efficientllm bench MODEL --table {path}`"
        ) from None
    except KeyError as error:
        raise UsageError(f"prune.latency_table {path} is no table of latencies (it has no {error})") from None
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        raise UsageError(f"prune.latency_table {path} is no table of latencies ({error})") from None
    return table
