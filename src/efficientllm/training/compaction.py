"""Compaction: when a run is cut narrower, and the cut, which is a resume (state.py)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.shapes import fitted
from efficientllm.pruning.widths import Widths
from efficientllm.training.snapshot import Snapshot, cut, cut_tokens
from efficientllm.training.state import PruningPlan, TrainState, capture, restore

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig


@dataclass(frozen=True)
class Compaction:
    """One change of shape: allocated widths and parameters before and after, and how long it took. vocabulary: its
    rows before and after, where some have gone."""

    before: Widths
    after: Widths
    allocated_before: int
    allocated_after: int
    seconds: float
    vocabulary: tuple[int, int] | None = None


def compaction_widths(
    live: Widths, allocated: Widths, feasible: FeasibleShapes, *, exactly: bool = False, frees: float = 0.0
) -> Widths | None:
    """Widths to compact to now, or None: live ones rounded up, where that frees this share of the allocated parameters;
    with `exactly` the live ones, whatever that frees. Never a shape that the family does not take."""
    widths, space = live if exactly else feasible.align.round_up(live, allocated), feasible.space
    widths = fitted(space, widths, allocated)
    if widths == allocated or (not exactly and 1.0 - space.num_params(widths) / space.num_params(allocated) < frees):
        return None
    return widths


def compact(state: TrainState, widths: Widths, train: TrainConfig, plan: PruningPlan) -> Compaction:
    """Narrows the run in place. Every old tensor is released as soon as it is cut."""
    began, before, allocated = time.perf_counter(), state.space.widths, state.allocated_parameters
    _renew(state, partial(cut, widths=widths, source=plan.source, consume=True, ranks=state.ranks), train, plan)
    return Compaction(before, widths, allocated, state.allocated_parameters, time.perf_counter() - began)


def shed(state: TrainState, kept: Tensor, train: TrainConfig, plan: PruningPlan) -> None:
    """Takes all but these rows of the vocabulary out of the run, which goes on by the plan for what is left."""
    _renew(state, partial(cut_tokens, kept=kept), train, plan)
    assert state.pruner is not None
    state.pruner.tokens.asked_at = state.pruner.parameters  # what has fallen just now is no reason to ask again


def _renew(state: TrainState, change: Callable[[Snapshot], Snapshot], train: TrainConfig, plan: PruningPlan) -> None:
    """The run, changed as a snapshot. Wrapped and compiled modules refer to each other in cycles, so that only the
    garbage collector frees theirs; a full GPU would not start it."""
    device, ranks, snapshot = state.device, state.ranks, capture(state)
    vars(state).clear()  # else it would hold on to what is about to be cut
    if train.compile:
        torch._dynamo.reset()
    if ranks.world > 1 or train.compile:
        gc.collect()
    state.become(restore(change(snapshot), train, plan, device, ranks))
