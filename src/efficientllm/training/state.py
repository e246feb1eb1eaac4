"""The state of a run, the snapshot it is saved as, and compaction, which is a cut between the two.

    capture(state) -> Snapshot -> cut(snapshot, widths) -> restore(snapshot) -> state

A checkpoint is a snapshot on disk; resuming is `restore`; compaction is `restore(cut(capture(state)))`. There is
no other way in which a tensor changes its shape.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from efficientllm.distributed.layout import Runner, sharded, wrap
from efficientllm.distributed.ranks import ALONE, Ranks
from efficientllm.models.space import empty_model, narrowed_config, space_of
from efficientllm.pruning.engine import PrunerOptions, PruningEngine
from efficientllm.pruning.groups import Live, Space, Widths
from efficientllm.pruning.landing import Landing
from efficientllm.pruning.schedule import Schedule
from efficientllm.pruning.shards import whole
from efficientllm.pruning.surgery import choose_kept, cut_live, cut_scores, cut_state
from efficientllm.training.gradient import Precision
from efficientllm.training.optim import build_optimizer, second_moment, shaped_moments

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig

# What a run counts; Snapshot and TrainState have a field of each name.
COUNTS = ("step", "tokens", "refresh_tokens", "lowered_tokens", "flops", "skipped_steps", "skipped_in_a_row")


@dataclass(frozen=True)
class PruningPlan:
    """What does not change over a run: where it may end, when it prunes, how it decides, when it compacts.

    source: the source model's config; every narrower one is derived from it. compact_at: share of the allocated
    parameters that a compaction must free to be worth it. correction_tokens: tokens of the batch whose inputs the
    correction sees. landings: the ladder's rungs, then the target. calibrate_on_next: measure bundles on the batch to
    come. lr_share: of the learning rate from token
    `begins` until pruning is over; 0 leaves the weights at rest (one-shot, iterative).
    """

    source: PretrainedConfig
    landings: tuple[Landing, ...]
    schedule: Schedule
    options: PrunerOptions
    compact_at: float
    correction_tokens: int = 4096
    calibrate_on_next: bool = False
    lr_share: float = 1.0
    begins: int = 0

    @property
    def landing(self) -> Landing:
        """The last one: the target's."""
        return self.landings[-1]


@dataclass
class Snapshot:
    """A run between two steps, as plain tensors and JSON values.

    weights {name: tensor}; moments {name: {key: tensor}} (AdamW's scalar step count included); pruner tensors and
    facts (None where nothing is pruned). Weights and moments of a run of several processes are DTensors. config: the
    transformers config as a dict. Counts: optimizer steps done, tokens read in steps, those of them at a lowered
    learning rate or none, tokens whose gradient was taken anew. flops: floating-point operations of training so far
    (models/flops.py), pruning and teacher included; NaN where the run began before they were counted. skipped_steps:
    those whose loss or gradient was not finite, in all and up to now without a good one between.
    """

    config: dict[str, Any]
    step: int
    tokens: int
    refresh_tokens: int
    lowered_tokens: int
    flops: float
    skipped_steps: int
    skipped_in_a_row: int
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    pruner_tensors: dict[str, Tensor] = field(default_factory=dict)
    pruner_facts: dict[str, Any] | None = None


@dataclass
class TrainState:
    """A live run: everything that changes while it trains. Whatever calls the model does so inside `run`, which
    gathers sharded weights for as long as the call lasts; ranks: this process among those that share the run."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    space: Space
    pruner: PruningEngine | None
    run: Runner
    ranks: Ranks
    step: int = 0
    tokens: int = 0
    refresh_tokens: int = 0
    lowered_tokens: int = 0
    flops: float = 0  # whole numbers, exact while they are Python's own
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    @property
    def live_parameters(self) -> int:
        return self.pruner.parameters if self.pruner else self.allocated_parameters

    @property
    def allocated_parameters(self) -> int:
        return int(self.space.num_params())

    @property
    def live_widths(self) -> Widths:
        return self.pruner.widths if self.pruner else self.space.widths


def start(model: PreTrainedModel, train: TrainConfig, plan: PruningPlan | None, ranks: Ranks = ALONE) -> TrainState:
    """A run at step 0 on a freshly loaded model, the same on every process; it may still lie on the CPU."""
    run = _wrapped(model, train, ranks, next(model.parameters()).device)
    return _assemble(model, train, plan, run, ranks)


def _wrapped(model: PreTrainedModel, train: TrainConfig, ranks: Ranks, device: torch.device | str) -> Runner:
    model.train()
    kind = ranks.mesh.device_type if ranks.mesh else str(device)
    return wrap(
        model,
        ranks,
        gradient_checkpointing=train.gradient_checkpointing,
        compile_blocks=train.compile,
        bf16=Precision.choose(train.precision, torch.device(kind)).bf16,
    )


def _assemble(
    model: PreTrainedModel, train: TrainConfig, plan: PruningPlan | None, run: Runner, ranks: Ranks
) -> TrainState:
    """Optimizer and pruner around a model that has its weights."""
    space = space_of(model.config)
    optimizer = build_optimizer(model, train)
    pruner = None
    if plan is not None:
        params = dict(model.named_parameters())
        pruner = PruningEngine(
            space,
            params,
            lambda name: shaped_moments(optimizer, params[name]),
            second_moment=lambda name: second_moment(optimizer, params[name]),
            landings=plan.landings,
            schedule=plan.schedule,
            options=plan.options,
            reduction=ranks,
        )
    return TrainState(model, optimizer, space, pruner, run, ranks)


def capture(state: TrainState) -> Snapshot:
    """The state as a snapshot. Its tensors are the live ones, not copies: use or write it before the next step."""
    counts = {name: getattr(state, name) for name in COUNTS}
    return snapshot_of(state.model, state.optimizer, state.pruner, counts)


def snapshot_of(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    pruner: PruningEngine | None,
    counts: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Model, optimizer and pruner between two steps, uncopied. counts: COUNTS by name, default all 0."""
    counts = dict.fromkeys(COUNTS, 0) if counts is None else counts
    named = dict(model.named_parameters())
    weights = {name: weight.detach() for name, weight in named.items()}
    moments = {name: dict(optimizer.state.get(weight, {})) for name, weight in named.items()}
    tensors, facts = pruner.state() if pruner else ({}, None)
    return Snapshot(
        model.config.to_dict(),
        **counts,
        weights=weights,
        moments=moments,
        pruner_tensors=tensors,
        pruner_facts=facts,
    )


def config_of(snapshot: Snapshot) -> PretrainedConfig:
    values = dict(snapshot.config)
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def cut(snapshot: Snapshot, widths: Widths, source: PretrainedConfig, *, consume: bool = False) -> Snapshot:
    """The snapshot at narrower widths, none below the live ones; its tensors are new.

    source: the config of the model that the run began with; a Llama that passes through a shape which only Mistral
    takes becomes a Llama again where LlamaConfig allows. With `consume` each tensor is dropped from the given
    snapshot once it is cut, so that old and new never stand in memory whole.
    """
    space = space_of(config_of(snapshot))
    assert snapshot.pruner_facts is not None, "only a run that prunes is ever cut"
    live = Live(
        **{name: snapshot.pruner_tensors[f"live.{name}"] for name in ("hidden", "layers", "ffn", "kv", "query")}
    )
    kept = choose_kept(live, widths)
    weights, moments = cut_state(space, kept, snapshot.weights, snapshot.moments, consume=consume)
    prefix = "saliency."
    scores = {k.removeprefix(prefix): v for k, v in snapshot.pruner_tensors.items() if k.startswith(prefix)}
    tensors = {f"live.{name}": mask for name, mask in cut_live(live, kept).tensors().items()}
    tensors |= {prefix + name: score for name, score in cut_scores(scores, kept, space.widths).items()}
    narrow = narrowed_config(source, widths).to_dict()
    return replace(snapshot, config=narrow, weights=weights, moments=moments, pruner_tensors=tensors)


def restore(
    snapshot: Snapshot,
    train: TrainConfig,
    plan: PruningPlan | None,
    device: torch.device | str,
    ranks: Ranks = ALONE,
) -> TrainState:
    """A live run from a snapshot: the model built anew at its widths, around the snapshot's own tensors.

    The snapshot is empty afterwards; a run that it was captured from must be dropped, since the tensors are the same.
    """
    model = empty_model(config_of(snapshot), device)
    run = _wrapped(model, train, ranks, device)
    fill_model(model, {name: weight.detach().to(device) for name, weight in snapshot.weights.items()})
    state = _assemble(model, train, plan, run, ranks)
    load_moments(state.optimizer, model, snapshot.moments)
    snapshot.weights, snapshot.moments = {}, {}  # they belong to the run now
    if state.pruner and snapshot.pruner_facts is not None:
        state.pruner.load_state(snapshot.pruner_tensors, snapshot.pruner_facts)
    for name in COUNTS:
        setattr(state, name, getattr(snapshot, name))
    return state


def model_of(snapshot: Snapshot, device: torch.device | str) -> PreTrainedModel:
    """A new model of the snapshot's widths around its weights, which are not copied unless the device differs."""
    model = empty_model(config_of(snapshot), device)
    fill_model(model, {name: weight.detach().to(device) for name, weight in snapshot.weights.items()})
    return model


def fill_model(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Puts weights in the places of an empty model's, uncopied; tied ones stay tied."""
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    holes = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert not holes, f"the snapshot lacks {holes[0]}"


def whole_model(state: TrainState) -> PreTrainedModel | None:
    """The run's model for export: itself on one process; with several a copy on rank 0's CPU, None elsewhere.

    A collective: each weight is gathered in turn, and only rank 0 keeps it.
    """
    if state.ranks.world == 1:
        return state.model
    weights = {}
    for name, weight in state.model.named_parameters():
        full = whole(weight)
        if state.ranks.leads:
            weights[name] = full.cpu()
        del full
    if not state.ranks.leads:
        return None
    model = empty_model(state.model.config)
    fill_model(model, weights)
    return model


def laid_out(snapshot: Snapshot, ranks: Ranks, device: torch.device | str) -> Snapshot:
    """A snapshot of whole tensors as this run's processes keep it."""
    weights = {name: sharded(weight.to(device), ranks) for name, weight in snapshot.weights.items()}
    moments = {
        name: {key: sharded(value.to(device) if value.ndim else value, ranks) for key, value in each.items()}
        for name, each in snapshot.moments.items()
    }
    return replace(snapshot, weights=weights, moments=moments)


def load_moments(
    optimizer: torch.optim.Optimizer, model: PreTrainedModel, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Puts optimizer state {name: {key: tensor}} in place, uncopied where it lies on the right device already."""
    for name, weight in model.named_parameters():
        if moments.get(name):
            optimizer.state[weight] = {
                key: _placed(value, weight, fused=bool(optimizer.defaults.get("fused")))
                for key, value in moments[name].items()
            }


def _placed(value: Tensor, weight: Tensor, *, fused: bool) -> Tensor:
    """A moment beside its weight; AdamW's step count only where the optimizer is fused, else where it was."""
    return value.detach().to(weight.device if value.ndim or fused else value.device)


def compaction_widths(state: TrainState, plan: PruningPlan, *, exactly: bool = False) -> Widths | None:
    """Widths to compact to now, or None: live widths rounded up, once that frees enough or pruning is over.

    exactly: to the live widths, whatever that frees.
    """
    pruner = state.pruner
    if pruner is None or pruner.live.all_live():
        return None
    exactly = exactly or pruner.finished
    widths = pruner.widths if exactly else plan.landing.align.round_up(pruner.widths, state.space.widths)
    if widths == state.space.widths:
        return None
    freed = 1.0 - state.space.num_params(widths) / state.allocated_parameters
    return widths if exactly or freed >= plan.compact_at else None


def compact(state: TrainState, widths: Widths, train: TrainConfig, plan: PruningPlan) -> None:
    """Narrows the run in place. Every old tensor is released as soon as it is cut: of wrapped modules, which hold each
    other in circles, by the garbage collector, which no lack of GPU memory would wake."""
    device = next(state.model.parameters()).device
    snapshot = capture(state)
    for name in ("model", "optimizer", "pruner", "run"):
        setattr(state, name, None)
    if state.ranks.world > 1:
        gc.collect()
    narrower = restore(cut(snapshot, widths, plan.source, consume=True), train, plan, device, state.ranks)
    for name in ("model", "optimizer", "space", "pruner", "run"):
        setattr(state, name, getattr(narrower, name))
