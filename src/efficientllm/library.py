"""The method in anybody's training loop: two calls around the optimizer's step.

pruner = Pruner(model, optimizer, target="469M", steps=2000)
loss = model(input_ids=ids, labels=ids).loss
loss.backward();  pruner.observe()       # saliency from the gradient that training has just computed
optimizer.step(); pruner.step()          # zero the next groups when the schedule says so
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.checkpoint.export import export_model
from efficientllm.config import PruneConfig
from efficientllm.config.fields import explain
from efficientllm.errors import UsageError
from efficientllm.models.parts import is_recomputed, recompute
from efficientllm.models.space import check_space, space_of
from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.dimensions import DEFAULT_TYPES
from efficientllm.pruning.engine import PruningEngine
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Space
from efficientllm.pruning.schedule import SpanSchedule
from efficientllm.pruning.surgery import choose_kept, names_after
from efficientllm.pruning.widths import Widths
from efficientllm.training.capture import Inputs, captured_inputs, unwatched, watched_gates
from efficientllm.training.looks import correction_tokens
from efficientllm.training.optim import load_moments, shaped_moments
from efficientllm.training.planning import decided
from efficientllm.training.replay import Replay
from efficientllm.training.snapshot import cut, model_of, snapshot_of

# Keys of the prune section that say how our own loop is run.
RECIPE_ONLY = frozenset({"ladder", "mode", "end", "every"})
LossFunction = Callable[[], Tensor]


class Pruner:
    """Prunes a transformers model while somebody's loop trains it.

    model: a supported decoder (Llama, Mistral, Qwen2, Qwen3). optimizer: built on its parameters (Adam, AdamW, SGD).
    target: parameters ("469M"), a share ("40%", 0.4), widths ({"hidden": 512}) or a size in another cost, with that
    cost ({"flops": "40%"}, cost="flops"). steps: calls of step() until the
    target is reached, from the `start`-th on. loss_fn: returns the loss of the current batch, with its graph;
    default: the last forward call is run again, in its autocast. With a GradScaler call unscale_(optimizer) before
    observe(). Further keywords are the recipe's prune keys: curve, saliency, types, selection, bound, correction,
    align, floors, cost, latency_table. sequence_length: tokens at which cost "flops" counts. One process.

    Raises UsageError or ValueError, in one sentence, for what cannot be had.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        *,
        target: str | int | float | Mapping[str, Any],
        steps: int,
        start: int = 0,
        sequence_length: int | None = None,
        loss_fn: LossFunction | None = None,
        types: Sequence[str] = DEFAULT_TYPES,
        **prune: Any,
    ) -> None:
        _refuse_several_processes()
        options = _options({"target": target, "types": list(types)} | prune)
        foreign = sorted(RECIPE_ONLY & prune.keys())
        if foreign:
            raise ValueError(
                f"{foreign[0]} belongs to a recipe, which runs the loop itself; Pruner lives in yours: leave it out"
            )
        if (options.cost == "flops") != (sequence_length is not None):
            raise ValueError(
                "Pruner takes sequence_length, the tokens of your rows, with cost 'flops', which counts at a length, "
                "and with no other"
            )
        space = space_of(model.config)
        check_space(space, model)
        if any(weight.dtype != torch.float32 for weight in model.parameters()):
            raise ValueError("Pruner needs fp32 weights (bf16 by autocast): load the model with dtype=torch.float32")
        self.model, self.optimizer = model, optimizer
        self._source = copy.deepcopy(model.config)
        self.calls = 0
        if steps < 1:
            raise ValueError("steps must be at least 1: the number of optimizer steps over which to prune")
        self._options, (*_, self._landing) = decided(options, model.config, sequence_length or 1)
        size = self._landing.cost(space.widths)
        self._schedule = SpanSchedule(start, start + steps, size, self._landing.target, options.curve)
        self._correction_tokens = correction_tokens(space, None)
        self._observed = False
        self._given_loss = loss_fn
        self._bind(space)

    def _bind(self, space: Space) -> None:
        """Points the engine at the model and optimizer in hand."""
        params = dict(self.model.named_parameters())
        self._replay = None if self._given_loss else Replay(self.model)
        self.engine = PruningEngine(
            space,
            params,
            lambda name: shaped_moments(self.optimizer, params[name]),
            landings=[self._landing],
            schedule=self._schedule,
            options=self._options,
        )

    @property
    def finished(self) -> bool:
        return self.engine.finished

    @property
    def parameters(self) -> int:
        """Live parameters."""
        return self.engine.parameters

    @property
    def widths(self) -> Widths:
        """Live widths."""
        return self.engine.widths

    def observe(self) -> None:
        """After backward(), best before clipping: takes the saliency from .grad. Every step, also once finished."""
        self.engine.observe()
        self._observed = True

    def step(self) -> PruneReport:
        """After optimizer.step(): carries out the events that are due; where it pruned, gradients are cleared.

        May run the current batch again: now and then to measure what a bundle costs, and, where the schedule asks
        for more than one bundle a step, to look at the gradient anew. Batches to come are the caller's own.
        """
        if not (self._observed or self.finished):
            raise ValueError("step() has no saliency to go by; call observe() after every backward()")
        self.calls += 1
        report = self.engine.step(self.calls, self)
        if report.events:
            self.optimizer.zero_grad(set_to_none=True)
        return report

    def _current_loss(self) -> Tensor:
        function = self._given_loss or self._replay
        assert function is not None
        return function()

    def measure(self) -> Callable[[], float]:
        """For the engine: measures the loss of the current batch in nats, without a gradient."""

        @torch.no_grad()
        def loss() -> float:
            return float(self._current_loss())

        return loss

    def gates(self) -> None:
        """For the engine: the passes of somebody's loop are not watched."""
        return None

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Mapping[str, Tensor]:
        """For the engine: the gradient of the current batch at the current weights, in .grad; inputs on the way."""
        self.optimizer.zero_grad(set_to_none=True)
        watching = watched_gates(self.model, self.engine.space, gates) if gates is not None else nullcontext(unwatched)
        with self._capturing(names) as inputs, watching as watch:
            with inputs.taken(0), watch(0):
                loss = self._current_loss()
            loss.backward()
        return inputs

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """For the engine: inputs (tokens, inputs) of linear layers, on the current batch's first tokens."""
        with self._capturing(names) as inputs, inputs.taken(0):
            self._current_loss()
        return inputs

    def _capturing(self, names: Sequence[str]) -> AbstractContextManager[Inputs]:
        return captured_inputs(self.model, names, self._correction_tokens, waits=True)

    def _aligned_widths(self) -> Widths:
        if self.finished:
            return self.widths
        return self._landing.align.round_up(self.widths, self.engine.space.widths)

    def compact(self) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        """The smaller model and an optimizer of the same kind with its state; the old ones are to be dropped.

        Live widths are rounded up to the alignment until pruning is finished. Learning-rate schedulers must be made
        anew for the new optimizer. Raises ValueError for an optimizer that is wrapped (by accelerate, say) or whose
        state cannot be cut.
        """
        if hasattr(self.optimizer, "optimizer"):
            raise ValueError(
                f"compact() cannot replace a wrapped optimizer ({type(self.optimizer).__name__}); give Pruner the "
                "plain one, or leave the tensors at their size and call save_pretrained() at the end"
            )
        widths = self._aligned_widths()
        snapshot = cut(snapshot_of(self.model, self.optimizer, self.engine), widths, self._source)
        device = next(self.model.parameters()).device
        after = names_after(self.engine.space, choose_kept(self.engine.live, widths))
        names = {weight: after[name] for name, weight in self.model.named_parameters() if name in after}
        training = self.model.training
        model = model_of(snapshot, device)
        model.train(training)
        model.generation_config = self.model.generation_config
        model.config.use_cache = self.model.config.use_cache
        model.set_attn_implementation(self.model.config._attn_implementation)
        if is_recomputed(self.model):
            recompute(model)
        fresh = dict(model.named_parameters())
        for weight, name in names.items():
            fresh[name].requires_grad_(weight.requires_grad)
        groups = [
            {**group, "params": [fresh[names[weight]] for weight in group["params"] if weight in names]}
            for group in self.optimizer.param_groups
        ]
        kind: Any = type(self.optimizer)  # its hyperparameters travel in the groups
        self.optimizer = kind(groups)
        load_moments(self.optimizer, model, snapshot.moments)
        if self._replay:
            self._replay.remove()
        self.model = model
        self._bind(space_of(model.config))
        assert snapshot.pruner_facts is not None
        self.engine.load_state(snapshot.pruner_tensors, snapshot.pruner_facts)
        return model, self.optimizer

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Writes the model, cut to its live widths, as a folder that plain transformers loads."""
        widths = self._aligned_widths()
        model = self.model
        if widths != self.engine.space.widths:
            snapshot = snapshot_of(self.model, self.optimizer, self.engine)
            snapshot.moments = {}
            model = model_of(cut(snapshot, widths, self._source), next(self.model.parameters()).device)
        export_model(model, tokenizer, Path(folder), generation=copy.deepcopy(self.model.generation_config))


def _refuse_several_processes() -> None:
    """Raises UsageError where this is one of several processes: nothing here is summed over them."""
    distributed = torch.distributed
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if world > 1:
        raise UsageError(
            f"Pruner prunes in one process, and this is one of {world}: each would zero units of its own; use "
            "`efficientllm prune` under torchrun, which prunes on several, or start one process"
        )


def _options(values: dict[str, Any]) -> PruneConfig:
    try:
        return PruneConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
