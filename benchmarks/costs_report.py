"""How benchmarks/costs.py compares arms: what each pays of every measure at equal validation loss, paired by seed.

The runs of one arm and seed are a path from large to small in the cost that the arm prunes by. Along it the loss is
fitted by isotonic regression (it may only grow as the size falls; runs that are worse than a smaller one are averaged
with it, not dropped), and joined linearly over the logarithm of the size. A loss thus has a size on the path, and
that size a share of every measure, interpolated in logarithms between the runs. For two arms the ratio of the shares
is averaged, as a logarithm, over the window of losses that both have with every seed. The seeds give the interval:
Student's, 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

from efficientllm.comparison.statistics import over_seeds
from efficientllm.reporting.tables import markdown

MEASURED = "latency, measured"
LOSSES = 33  # points in the window
Row = dict[str, Any]
Points = list[tuple[float, float]]


def isotonic(points: Points) -> Points:
    """Pools neighbours until y never falls as x rises: least squares under that condition (pool adjacent violators).
    Every pool becomes one point, the means of its x and y; points must be sorted by x."""
    pools: list[tuple[float, float, int]] = []
    for x, y in points:
        pool = (x, y, 1)
        while pools and (pools[-1][1] >= pool[1] or pools[-1][0] == pool[0]):
            x0, y0, n0 = pools.pop()
            n = n0 + pool[2]
            pool = ((x0 * n0 + pool[0] * pool[2]) / n, (y0 * n0 + pool[1] * pool[2]) / n, n)
        pools.append(pool)
    return [(x, y) for x, y, _ in pools]


def interpolate(points: Points, x: float) -> float:
    """Linearly between points sorted by x; the nearest one's outside of them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


class Path:
    """The runs of one arm with one seed, as a curve in loss."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = sorted(rows, key=lambda row: -row["shares"][row["cost"]])
        loss_of = isotonic([(self._size(row), row["loss"]) for row in self.rows])
        self._size_at: Points = [(loss, size) for size, loss in loss_of]
        self.low, self.high = self._size_at[0][0], self._size_at[-1][0]

    @staticmethod
    def _size(row: Row) -> float:
        """Rises as the model gets smaller."""
        return -math.log(row["shares"][row["cost"]])

    def share(self, measure: str, loss: float) -> float:
        """Logarithm of the share of a measure that the arm pays for a loss."""
        size = interpolate(self._size_at, loss)
        points: Points = []
        for key, each in groupby(self.rows, key=self._size):
            points.append((key, statistics.mean(math.log(row["shares"][measure]) for row in each)))
        return interpolate(points, size)


def paths_of(rows: Sequence[Row]) -> dict[str, dict[int, Path]]:
    """By cost and seed."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["cost"], {}).setdefault(row["seed"], []).append(row)
    return {cost: {seed: Path(each) for seed, each in seeds.items()} for cost, seeds in found.items()}


def window(*arms: dict[int, Path]) -> tuple[float, float]:
    """Losses that every path of these arms reaches; empty where the first is above the second."""
    paths = [path for arm in arms for path in arm.values()]
    return max(path.low for path in paths), min(path.high for path in paths)


def paired(own: dict[int, Path], other: dict[int, Path], measure: str) -> tuple[float, float, float] | None:
    """(mean, low, high) over the seeds of log(own share / other's share) in the common window; None without one."""
    low, high = window(own, other)
    if low >= high:
        return None
    losses = [low + (high - low) * index / (LOSSES - 1) for index in range(LOSSES)]
    differences = [
        statistics.mean(own[seed].share(measure, loss) - other[seed].share(measure, loss) for loss in losses)
        for seed in own
    ]
    if len(differences) < 2:
        return statistics.mean(differences), -math.inf, math.inf
    found = over_seeds(differences, [0.0] * len(differences))
    return found.mean, found.low, found.high


def comparison_table(rows: Sequence[Row]) -> str:
    """Rows: a measure and the arm that prunes by it; columns: how much less or more of it than each other arm."""
    paths = paths_of(rows)
    table = [["measure, own arm", *(f"against {name}" for name in paths)]]
    for measure in rows[0]["shares"]:
        own = "latency" if measure == MEASURED else measure
        cells = [_cell(paired(paths[own], paths[name], measure)) if name != own else "" for name in paths]
        table.append([f"{measure}, by {own}", *cells])
    windows = [
        f"{first} and {second} {low:.3f} to {high:.3f}"
        for index, first in enumerate(paths)
        for second in list(paths)[index + 1 :]
        for low, high in [window(paths[first], paths[second])]
    ]
    return f"{markdown(table)}\n\nWindows of loss: {'; '.join(windows)}."


def _cell(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "no common loss"
    mean, low, high = (math.expm1(each) for each in found)
    text = f"{mean:+.1%} ({low:+.1%} to {high:+.1%})"
    return f"**{text}**" if low > 0 or high < 0 else text


def results_table(rows: Sequence[Row]) -> str:
    """One line an arm and size: losses and shapes by seed, shares as means over the seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["cost"], row["share"]), []).append(row)
    measures = list(rows[0]["shares"])
    table = [["pruned by", "to", "validation loss by seed", "hidden/heads/FFN by seed", *measures]]
    for (cost, share), group in groups.items():
        shapes = [row["widths"] for row in group]
        losses = ", ".join(f"{row['loss']:.3f}" for row in group)
        widths = ", ".join(f"{shape.hidden}/{shape.heads}/{shape.intermediate}" for shape in shapes)
        means = [statistics.mean(row["shares"][name] for row in group) for name in measures]
        table.append([cost, share, losses, widths, *(f"{mean:.1%}" for mean in means)])
    return markdown(table)
