"""Compaction: when a run is cut narrower, and the cut, which is a resume (state.py)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from efficientllm.pruning.shapes import fitted
from efficientllm.pruning.widths import Widths
from efficientllm.training.snapshot import Snapshot, cut, cut_tokens
from efficientllm.training.state import PruningPlan, TrainState, capture, restore

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig

# Of a TrainState: what a compaction replaces.
TIED_TO_SHAPE = ("model", "optimizer", "space", "pruner", "origin", "runner")


def compaction_widths(state: TrainState, plan: PruningPlan, *, exactly: bool = False) -> Widths | None:
    """Widths to compact to now, or None: live widths rounded up, once that frees enough or pruning is over; with
    `exactly` the live widths, whatever that frees."""
    pruner = state.pruner
    if pruner is None or pruner.live.all_live():
        return None
    space, exactly = state.space, exactly or pruner.finished
    return narrower(pruner.widths, space.widths, plan, space.num_params, exactly=exactly)


def narrower(
    live: Widths, allocated: Widths, plan: PruningPlan, count: Callable[[Widths], float], *, exactly: bool
) -> Widths | None:
    """Widths that allocated ones are to be cut to, or None. count: parameters of a model of some widths."""
    widths = live if exactly else plan.feasible.align.round_up(live, allocated)
    widths = fitted(plan.feasible.space, widths, allocated)
    if widths == allocated:
        return None
    return widths if exactly or 1.0 - count(widths) / count(allocated) >= plan.compact_at else None


def compact(state: TrainState, widths: Widths, train: TrainConfig, plan: PruningPlan) -> None:
    """Narrows the run in place. Every old tensor is released as soon as it is cut."""
    _renew(state, lambda snapshot: cut(snapshot, widths, plan.source, consume=True, ranks=state.ranks), train, plan)


def shed(state: TrainState, kept: Tensor, train: TrainConfig, plan: PruningPlan) -> None:
    """Takes all but these rows of the vocabulary out of the run, which goes on by the plan for what is left."""
    _renew(state, lambda snapshot: cut_tokens(snapshot, kept), train, plan)
    assert state.pruner is not None
    state.pruner.tokens.asked_at = state.pruner.parameters  # what has fallen just now is no reason to ask again


def _renew(state: TrainState, change: Callable[[Snapshot], Snapshot], train: TrainConfig, plan: PruningPlan) -> None:
    """The run, changed as a snapshot. Wrapped and compiled modules refer to each other in cycles, so that only the
    garbage collector frees theirs; a full GPU would not start it."""
    device, snapshot = state.device, capture(state)
    for name in TIED_TO_SHAPE:
        setattr(state, name, None)
    if train.compile:
        torch._dynamo.reset()
    if state.ranks.world > 1 or train.compile:
        gc.collect()
    adopt(state, restore(change(snapshot), train, plan, device, state.ranks))


def adopt(state: TrainState, narrower: TrainState) -> None:
    """The run goes on with the tensors of another, which is to be dropped."""
    for name in TIED_TO_SHAPE:
        setattr(state, name, getattr(narrower, name))
