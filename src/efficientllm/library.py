"""The method in anybody's training loop: two calls around the optimizer's step.

pruner = Pruner(model, optimizer, target="469M", steps=2000)
loss = model(input_ids=ids, labels=ids).loss
loss.backward();  pruner.observe()       # saliency from the backward pass that training has just made
optimizer.step(); pruner.step()          # zero the next groups when the schedule says so
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.checkpoint.export import export_model
from efficientllm.config import PruneConfig
from efficientllm.config.fields import explain
from efficientllm.distributed.layout import as_found, unwrapped
from efficientllm.models.space import check_space, space_of
from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.dimensions import DEFAULT_TYPES, VOCAB
from efficientllm.pruning.engine import PruningEngine
from efficientllm.pruning.looks import scores_are_known
from efficientllm.pruning.schedule import SpanSchedule
from efficientllm.pruning.shards import is_sharded, whole
from efficientllm.pruning.surgery import choose_kept, names_after
from efficientllm.pruning.widths import Widths
from efficientllm.training.compaction import compaction_widths
from efficientllm.training.optim import check_trains, optimizer_like
from efficientllm.training.passes import correction_tokens
from efficientllm.training.planning import compared_by_scale, decided
from efficientllm.training.replay import CurrentBatch
from efficientllm.training.snapshot import Snapshot, cut, model_like, model_of
from efficientllm.training.state import PruningPlan, assemble, capture

RECIPE_ONLY = frozenset({"ladder", "mode", "end", "every", "rotate"})  # prune keys that say how our own loop is run
COMPACTED_EARLY = (
    "pruning goes on after this compact(): no Pruner can load a state_dict() taken from here on; to be able to resume "
    "from your own checkpoints, compact once finished"
)


class Pruner:
    """Prunes a transformers model while somebody's loop trains it.

    model: a supported decoder (models/families.py), on the device where it trains. optimizer: built on its parameters
    (Adam, AdamW, SGD).
    target: parameters ("469M"), a share ("40%", 0.4), widths ({"hidden": 512}) or a size in another cost, with that
    cost ({"flops": "40%"}, cost="flops"). steps: calls of step() until the target is reached, from the `start`-th on.
    loss_fn: returns the loss of the current batch, with its graph; default: the last forward call again, in its
    autocast. Gates are seen where model(...) itself is called, without fp16 autocast; elsewhere a look is a pass more.
    With a GradScaler call unscale_(optimizer) before observe(). Further keywords are the recipe's prune keys (curve,
    saliency, types, bound, cost, ...). sequence_length: tokens at which cost "flops" counts.

    process_group: the processes whose loops train this model together (torch.distributed.group.WORLD), each on its own
    rows of the batch: copies of one model (DistributedDataParallel, but for static_graph) or its shards (FSDP2). Scores
    and losses are met over them; all take the same events, and call observe() and step() alike.

    Raises UsageError or ValueError, in one sentence, for what cannot be had; warns on the first process alone.
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
        loss_fn: Callable[[], Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        types: Sequence[str] = DEFAULT_TYPES,
        **prune: Any,
    ) -> None:
        model = unwrapped(model)
        runner, ranks = as_found(model, process_group)
        options = options_of({"target": target, "types": list(types)} | prune)
        if (options.cost == "flops") != (sequence_length is not None):
            raise ValueError("give sequence_length, the tokens of your rows, with cost 'flops', and with no other cost")
        space = space_of(model.config)
        check_space(space, model)
        check_trains(optimizer, model)
        if any(weight.dtype != torch.float32 for weight in model.parameters()):
            raise ValueError("Pruner needs fp32 weights (bf16 by autocast): load the model with dtype=torch.float32")
        if steps < 1:
            raise ValueError("steps must be at least 1: the number of optimizer steps over which to prune")
        decides, milestones = decided(options, model.config, sequence_length or 1)
        for advice in compared_by_scale(options, decides) if ranks.leads else ():
            warnings.warn(advice, stacklevel=2)
        size, feasible = milestones[-1].cost(space.widths), milestones[-1]
        schedule = SpanSchedule(start, start + steps, size, feasible.target, options.curve)
        self._plan = PruningPlan(copy.deepcopy(model.config), milestones, schedule, decides)
        self._state = assemble(model, optimizer, self._plan, runner, ranks)
        self._asked = options.model_dump(mode="json") | {"steps": steps, "start": start, "length": sequence_length}
        self._sharded = any(is_sharded(weight) for weight in model.parameters())
        self._observed = False
        self._loss_fn = loss_fn
        self._passes = CurrentBatch(self._state, correction_tokens(space), loss_fn)

    @property
    def model(self) -> PreTrainedModel:
        return self._state.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._state.optimizer

    @property
    def engine(self) -> PruningEngine:
        assert self._state.pruner is not None
        return self._state.pruner

    @property
    def calls(self) -> int:
        """How often step() has been called."""
        return self._state.step

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
        """After backward(), best before clipping: a criterion that looks at gradients takes them from .grad; gates have
        been seen on the way. Every step, also once finished: what is dead is kept so here."""
        self.engine.observe()
        self._observed = True

    def step(self) -> PruneReport:
        """After optimizer.step(): carries out the events that are due; where it pruned, gradients are cleared. A second
        bundle takes a look at the current batch, run again: batches to come are the caller's own."""
        if not (self._observed or self.finished):
            raise ValueError("step() has no saliency to go by; call observe() after every backward()")
        self._state.step, self._observed = self._state.step + 1, False
        report = self._passes.prune(self.calls)
        self._passes.hold()
        return report

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs beside the model's and the optimizer's own states: tensors on the CPU and plain
        values, the same on every process. Torch saves it, and loads it with weights_only."""
        tensors, facts = self.engine.state()
        tensors = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        shape = {"source": space_of(self._plan.source).widths.record(), "allocated": self._state.space.widths.record()}
        return {"tensors": tensors, "facts": facts, "calls": self.calls, "asked": self._asked, "shape": shape}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where another Pruner left off, asked for the same, on a model and an optimizer that have been
        loaded already; any number of processes. Raises ValueError for a state that does not fit; warns of one whose
        scores an earlier version has taken, which are left out."""
        saved = {**state["asked"], **state["shape"]}
        if saved.get("selection") in ("auto", "calibrated"):  # of an earlier version: its facts say what it has done
            del saved["selection"]
        for key, own in {**self._asked, **self.state_dict()["shape"]}.items():
            if saved.get(key, own) != own:  # of a key that is younger than the state nothing is known
                raise ValueError(
                    f"the state to go on from was pruned with {key} {saved[key]}, this Pruner has {own}; ask for "
                    "the same, on the model as it was before pruning, not compacted"
                )
        if self._state.ranks.leads and not scores_are_known(state["facts"]):
            warnings.warn("an earlier version's scores are in another unit: they are taken anew", stacklevel=2)
        self.engine.load_state(state["tensors"], state["facts"])
        self._state.step, self._observed = state["calls"], False
        self._passes.hold()

    def close(self) -> None:
        """Lets go of the model: no forward call or gradient is watched any more. Saving goes on working."""
        self._passes.close()

    def _narrower(self) -> Widths | None:
        return compaction_widths(self.widths, self._state.space.widths, self._plan.feasible, exactly=self.finished)

    def _cut(self, *, moments: bool = True) -> Snapshot:
        """The run at its live widths, rounded up to the alignment until pruning is finished, in new tensors."""
        widths = self._narrower() or self._state.space.widths
        captured = capture(self._state)
        return cut(captured if moments else replace(captured, moments={}), widths, self._plan.source)

    def compact(self) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        """The smaller model and an optimizer of the same kind with its state; the old ones are to be dropped.

        Live widths are rounded up to the alignment until pruning is finished; until then no other Pruner can go on from
        a state_dict() that is taken after it, which a warning says. Learning-rate schedulers must be made anew for the
        new optimizer, a model that is wrapped for several processes wrapped anew on each of them. Raises
        ValueError for an optimizer that is wrapped (by accelerate, say) or whose state cannot be cut, and for shards.
        """
        if self._sharded:
            raise ValueError(
                "compact() cannot replace a model inside its shards; leave the tensors at their size and call "
                "save_pretrained() at the end"
            )
        if hasattr(self.optimizer, "optimizer"):
            raise ValueError(
                f"compact() cannot replace a wrapped optimizer ({type(self.optimizer).__name__}); give Pruner the "
                "plain one, or leave the tensors at their size and call save_pretrained() at the end"
            )
        if not self.finished and self._state.ranks.leads:
            warnings.warn(COMPACTED_EARLY, stacklevel=2)
        snapshot, old = self._cut(), self._state
        model = model_like(self.model, model_of(snapshot, old.device))
        weights = dict(model.named_parameters())
        kept = choose_kept(self.engine.live, space_of(model.config).widths)
        heirs = {name: weights[new] for name, new in names_after(self.engine.space, kept).items()}
        optimizer = optimizer_like(self.optimizer, self.model, heirs)
        old.become(assemble(model, optimizer, self._plan, old.runner, old.ranks, snapshot=snapshot))
        self._passes.close()
        self._passes = CurrentBatch(self._state, self._passes.tokens, self._loss_fn)
        return self.model, self.optimizer

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Writes the model, cut to its live widths, as a folder that plain transformers loads.

        With several processes rank 0 writes; shards are gathered for it, so that then all must call this.
        """
        with torch.no_grad():
            self._state.runner.run(lambda: None)  # an evaluation may have left weights gathered, in its own precision
        narrower = self._cut(moments=False) if self._narrower() else None
        if self._sharded:
            weights = narrower.weights if narrower else self.engine.params
            weights = {name: whole(weight) for name, weight in weights.items()}
            narrower = replace(narrower or capture(self._state), weights=weights)
        if self._state.ranks.leads:
            model = model_of(narrower, self._state.device) if narrower else self.model
            export_model(model, tokenizer, Path(folder), generation=copy.deepcopy(self.model.generation_config))


def options_of(values: Mapping[str, Any]) -> PruneConfig:
    """The prune section that these keywords make. Raises UsageError or ValueError for what a loop cannot ask for."""
    try:
        options = PruneConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    foreign = sorted(RECIPE_ONLY & values.keys()) or ([f"{VOCAB} in types"] if options.vocabulary else [])
    if foreign:
        raise ValueError(
            f"{foreign[0]} belongs to a recipe, which runs the loop itself; Pruner lives in yours: leave it out"
        )
    return options
