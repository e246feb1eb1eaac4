"""The state of a run, and the snapshot it is saved as. Compaction is a cut between the two (compaction.py).

    capture(state) -> Snapshot -> cut(snapshot, widths) -> restore(snapshot) -> state

A checkpoint is a snapshot on disk; resuming is `restore`; compaction is `restore(cut(capture(state)))`. There is
no other way in which a tensor changes its shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from efficientllm.distributed.layout import Runner, wrap
from efficientllm.distributed.ranks import ALONE, World
from efficientllm.models.experts import prepare
from efficientllm.models.parts import blocks, recompute
from efficientllm.models.space import empty_model, space_of
from efficientllm.pruning.contract import ORIGIN
from efficientllm.pruning.engine import PrunerOptions, PruningEngine
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Space
from efficientllm.pruning.live import part_of
from efficientllm.pruning.schedule import Schedule
from efficientllm.pruning.shards import whole
from efficientllm.pruning.widths import Widths
from efficientllm.training.gradient import Precision
from efficientllm.training.optim import build_optimizer, load_moments, shaped_moments
from efficientllm.training.snapshot import Counts, Snapshot, config_of, counts_of, fill_model, origin_of

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig


@dataclass(frozen=True)
class PruningPlan:
    """What does not change over a run: where it may end, when it prunes, how it decides, when it compacts.

    source: the source model's config; every narrower one is derived from it. compact_at: share of the allocated
    parameters that a compaction must free to be worth it. milestones: shapes of the ladder's sizes, then of the target.
    begins: the token at which pruning does. at_rest: all events of a milestone at once,
    before a step, the weights at rest (one-shot, iterative).
    """

    source: PretrainedConfig
    milestones: tuple[FeasibleShapes, ...]
    schedule: Schedule
    options: PrunerOptions
    compact_at: float = 0.0
    begins: int = 0
    at_rest: bool = False

    @property
    def feasible(self) -> FeasibleShapes:
        """The last one: the target's."""
        return self.milestones[-1]


@dataclass
class TrainState(Counts):
    """A live run: everything that changes while it trains. Whatever calls the model does so inside `runner.run`, which
    gathers sharded weights for as long as the call lasts; ranks: this process among those that share the run; origin:
    as of `origin_of`, empty where it is not known."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    space: Space
    pruner: PruningEngine | None
    runner: Runner = ALONE
    ranks: World = ALONE
    origin: dict[str, Tensor] = field(default_factory=dict)

    def become(self, other: TrainState) -> None:
        """Goes on as another run, which is to be dropped."""
        vars(self).update(vars(other))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def live_parameters(self) -> int:
        return self.pruner.parameters if self.pruner else self.allocated_parameters

    @property
    def allocated_parameters(self) -> int:
        return int(self.space.num_params())

    @property
    def live_widths(self) -> Widths:
        return self.pruner.widths if self.pruner else self.space.widths


def start(model: PreTrainedModel, train: TrainConfig, plan: PruningPlan | None, ranks: World = ALONE) -> TrainState:
    """A run at step 0 on a freshly loaded model, the same on every process; it may still lie on the CPU."""
    runner = _wrapped(model, train, ranks, next(model.parameters()).device)
    return assemble(model, build_optimizer(model, train), plan, runner, ranks)


def _wrapped(model: PreTrainedModel, train: TrainConfig, ranks: World, device: torch.device | str) -> Runner:
    model.train()
    if train.gradient_checkpointing:
        recompute(model)
    kind = ranks.mesh.device_type if ranks.mesh else str(device)
    return wrap(
        model,
        list(blocks(model)),
        ranks,
        compile_blocks=train.compile,
        bf16=Precision.choose(train.precision, torch.device(kind)).bf16,
    )


def assemble(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    plan: PruningPlan | None,
    runner: Runner = ALONE,
    ranks: World = ALONE,
    *,
    snapshot: Snapshot | None = None,
) -> TrainState:
    """A run around a model that has its weights, and an optimizer on them; where the snapshot, if any, left off."""
    prepare(model)
    space, pruner = space_of(model.config), None
    if plan is not None:
        params = dict(model.named_parameters())
        pruner = PruningEngine(
            space,
            params,
            lambda name: shaped_moments(optimizer, params[name]),
            milestones=plan.milestones,
            schedule=plan.schedule,
            options=plan.options,
            reduction=ranks,
        )
    origin = origin_of(space) if snapshot is None else part_of(snapshot.pruner_tensors, ORIGIN)
    counts = counts_of(snapshot) if snapshot else {}
    state = TrainState(model, optimizer, space, pruner, runner, ranks, origin, **counts)
    if snapshot is not None:
        load_moments(optimizer, model, snapshot.moments)
        if pruner and snapshot.pruner_facts is not None:
            pruner.load_state(snapshot.pruner_tensors, snapshot.pruner_facts)
    return state


def capture(state: TrainState) -> Snapshot:
    """The state as a snapshot. Its tensors are the live ones, not copies: use or write it before the next step."""
    named = dict(state.model.named_parameters())
    tensors, facts = state.pruner.state() if state.pruner else ({}, None)
    return Snapshot(
        state.model.config.to_dict(),
        {name: weight.detach() for name, weight in named.items()},
        {name: dict(state.optimizer.state.get(weight, {})) for name, weight in named.items()},
        tensors | {ORIGIN + name: units for name, units in state.origin.items()},
        facts,
        **counts_of(state),
    )


def restore(
    snapshot: Snapshot,
    train: TrainConfig,
    plan: PruningPlan | None,
    device: torch.device | str,
    ranks: World = ALONE,
) -> TrainState:
    """A live run from a snapshot: the model built anew at its widths, around the snapshot's own tensors.

    The snapshot is empty afterwards; a run that it was captured from must be dropped, since the tensors are the same.
    """
    model = empty_model(config_of(snapshot), device)
    runner = _wrapped(model, train, ranks, device)
    fill_model(model, {name: weight.detach().to(device) for name, weight in snapshot.weights.items()})
    state = assemble(model, build_optimizer(model, train), plan, runner, ranks, snapshot=snapshot)
    snapshot.weights, snapshot.moments = {}, {}  # they belong to the run now
    return state


def whole_model(state: TrainState) -> PreTrainedModel | None:
    """The run's model for export: itself on one process; with several a copy on rank 0's CPU, None elsewhere.

    A collective: each weight is gathered in turn, and only rank 0 keeps it.
    """
    if state.ranks.world == 1:
        return state.model
    weights = {}
    for name, weight in state.model.named_parameters():
        full = whole(weight)
        state.ranks.beat()
        if state.ranks.leads:
            weights[name] = full.cpu()
        del full
    if not state.ranks.leads:
        return None
    model = empty_model(state.model.config)
    fill_model(model, weights)
    return model
