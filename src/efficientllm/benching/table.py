"""Latency over a grid of widths: models of those shapes with random weights, on the device, in turn.

Every shape has one turn in every repeat, beginning with another shape each time; its model is made for the turn. In a
turn it alternates with a model of the source's shape, a few sequences each, and what counts is the ratio of the fastest
of both: other programs, and a clock that changes, slow down both alike. A shape's latency is the median ratio of its
turns times the source's median. Shapes held out of the grid are measured among the others, and tell how far its
interpolation is off.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from transformers import PretrainedConfig

from efficientllm.benching.process import measure, turn
from efficientllm.benching.results import machine
from efficientllm.benching.settings import Settings
from efficientllm.benching.transformers_backend import TransformersBackend, rehearse
from efficientllm.errors import UsageError
from efficientllm.models.experts import is_mixture
from efficientllm.models.latency_table import LatencyTable, MeasuredOn, family_of, table_content
from efficientllm.models.process_memory import memory_in_a_sentence
from efficientllm.models.space import build, head_dim_of, narrowed_config, widths_of
from efficientllm.pruning.costs import AXIS_TYPES, TABLE_AXES, shape_at
from efficientllm.pruning.shapes import Alignment
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.progress import tracked

SEED = 0  # of the shapes held out
IN_A_ROW = 5  # sequences of a turn, after one that does not count
Grid = tuple[tuple[int, ...], ...]


def grid_of(config: PretrainedConfig, levels: int = 3, *, depth: bool = False, least_ffn: int = 32) -> Grid:
    """Of each of TABLE_AXES evenly spaced widths from one layer, one head, `head_dim` residual and `least_ffn` FFN
    channels to the source's own, inner ones aligned as a run's would be. Fewer where an axis is short; layers stay
    unless `depth`."""
    if is_mixture(config):
        raise UsageError(
            "a latency table is of a dense model, and this is a mixture of experts: bench it without --table"
        )
    source = widths_of(config)
    least = {"hidden": head_dim_of(config), "intermediate": least_ffn, "layers": 1 if depth else source.layers}
    grid = []
    for axis, step in _steps(config).items():
        high = getattr(source, axis)
        low, last = min(least.get(axis, 1), high), levels - 1
        inner = (round((low + (high - low) * index / last) / step) * step for index in range(1, last))
        grid.append(tuple(sorted(level for level in {low, high, *inner} if low <= level <= high)))
    return tuple(grid)


def _steps(config: PretrainedConfig) -> dict[str, int]:
    align = Alignment.automatic(widths_of(config))
    return {axis: align.step(kind) for axis, kind in zip(TABLE_AXES, AXIS_TYPES, strict=True)}


def held_out_shapes(config: PretrainedConfig, grid: Grid, number: int = 8) -> list[Widths]:
    """Different shapes within the grid but not on it, aligned as a run's would be; fewer where there are no more."""
    choose = random.Random(SEED)
    axes: list[Sequence[int]] = []
    for step, levels in zip(_steps(config).values(), grid, strict=True):
        low, high = levels[0], levels[-1]
        axes.append(range(-(-low // step) * step, high + 1, step) or (high,))  # no multiple: what the source has
    found: dict[Widths, None] = {}
    for _ in range(100 * number):
        place = [choose.choice(axis) for axis in axes]
        if len(found) < number and any(width not in levels for width, levels in zip(place, grid, strict=True)):
            found[shape_at(place)] = None
    return list(found)


def measure_table(config: PretrainedConfig, settings: Settings, grid: Grid, held_out: list[Widths]) -> dict[str, Any]:
    """The content of the table's file (models/latency_table.py).

    Raises UsageError where a model does not fit in the memory of the device.
    """
    shapes = [shape_at(place) for place in product(*grid)]
    medians, spreads = latencies(config, [*shapes, *held_out], settings)
    model = {"family": family_of(config), "head_dim": head_dim_of(config), "vocabulary": config.vocab_size}
    asked = {name: getattr(settings, name) for name in ("dtype", "device", "threads", "prompt", "generate")}
    measured_on = MeasuredOn(**model, **asked, batch=settings.batches[0], machine=machine(settings))
    table = LatencyTable(measured_on, grid, tuple(medians[: len(shapes)]))
    cost, checks = table.cost(), []
    for widths, seconds in zip(held_out, medians[len(shapes) :], strict=True):
        told = {"widths": widths.record(), "seconds": seconds, "predicted": cost(widths)}
        checks.append(told | {"error": cost(widths) / seconds - 1})
    errors = [abs(check["error"]) for check in checks]
    more = {
        "held_out": checks,
        "median_error": statistics.median(errors) if errors else None,
        "worst_error": max(errors, default=None),
        "median_range": statistics.median(spreads),
        "repeats": settings.repeats,
        "in_a_row": IN_A_ROW,
    }
    return table_content(table, more)


def latencies(
    config: PretrainedConfig, shapes: Sequence[Widths], settings: Settings
) -> tuple[list[float], list[float]]:
    """Seconds of a whole sequence by models of these shapes, and how far the turns of each range, as a share of their
    median. Raises UsageError where a model does not fit in the memory of the device."""
    ratios: list[list[float]] = [[] for _ in shapes]
    source: list[float] = []
    starts = (repeat * len(shapes) // settings.repeats for repeat in range(settings.repeats))
    turns = [index for start in starts for index in turn(len(shapes), start)]
    lacking = f"two models of that size with {settings.context} tokens do not fit in the memory of the device"
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    gc.freeze()  # what is there already is left out of the garbage collection before every sequence
    try:
        with memory_in_a_sentence(lacking, "lower --batch or --prompt"), tracked("bench", turns) as order:
            rehearse(settings)
            reference = _model_of(config, widths_of(config), settings)
            for index in order:
                own, other = _turn(config, shapes[index], reference, settings)
                ratios[index].append(own / other)
                source.append(other)
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)  # another number would change the order of sums in a later training here
    medians = [statistics.median(each) for each in ratios]
    ranges = [(max(each) - min(each)) / median for each, median in zip(ratios, medians, strict=True)]
    return [median * statistics.median(source) for median in medians], ranges


def _model_of(config: PretrainedConfig, widths: Widths, settings: Settings) -> TransformersBackend:
    torch.manual_seed(0)
    model = build(narrowed_config(config, widths), settings.device)
    return TransformersBackend(model.to(getattr(torch, settings.dtype)), settings)


def _turn(
    config: PretrainedConfig, widths: Widths, reference: TransformersBackend, settings: Settings
) -> tuple[float, float]:
    """Seconds of the fastest whole sequence of a model of these widths, and of the reference beside it."""
    fastest = [math.inf, math.inf]
    models = (_model_of(config, widths, settings), reference)
    for run in range(1 + IN_A_ROW):
        for index, model in enumerate(models):
            sample = measure(model, settings.batches[0])
            if run:
                fastest[index] = min(fastest[index], sample["prefill_seconds"] + sample["decode_seconds"])
    return fastest[0], fastest[1]
