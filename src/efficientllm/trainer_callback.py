"""The method inside transformers' Trainer, and whatever is built on it (TRL's SFTTrainer)."""

from __future__ import annotations

import warnings
from base64 import b64decode, b64encode
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from efficientllm.config.sections import SPAN, SPAN_STEPS
from efficientllm.library import Pruner, options_of

FROM_TRAINER = frozenset({"model", "optimizer", "steps", "process_group"})  # of Pruner's arguments
NO_OPTIONS = frozenset({"start", "sequence_length", "loss_fn"})  # of Pruner's keywords; the others are prune keys


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the Trainer's model while it trains, over `span` (a share) of its steps; auto: 15 %, but no fewer than 20
    steps, as far as half of them allows. From the first step on, or `start`, a number of steps: a recipe waits for the
    end of warm-up.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback := PruningCallback(target="40%")])
        trainer.train()
        callback.pruner.save_pretrained("compact")

    Keywords as Pruner's, but what the Trainer says. One process, or several by accelerate: copies (DDP) or FSDP2's
    shards. The Trainer clips before the saliency is taken, which rescales all scores of a step alike; what is dead has
    no gradient by then.
    Tensors keep their size until save_pretrained: model, optimizer and scheduler that the Trainer has prepared cannot
    be replaced while it trains.

    The Trainer's checkpoints hold the zeroed model at its full shape, and in trainer_state.json what pruning goes on
    from (train(resume_from_checkpoint=...)): asked for the same, it ends as an undisturbed run does.
    """

    def __init__(self, *, target: Any, span: float | Literal["auto"] = "auto", **prune: Any) -> None:
        if span != "auto" and not (isinstance(span, float | int) and 0.0 < span <= 1.0):
            raise ValueError(f"span is {span}; it is the share of the training steps over which to prune, in (0, 1]")
        theirs = sorted(FROM_TRAINER & prune.keys())
        if theirs:
            raise ValueError(
                f"PruningCallback has {theirs[0]} from the Trainer: leave it out, and set span for the steps"
            )
        options_of({"target": target} | {key: value for key, value in prune.items() if key not in NO_OPTIONS})
        self._target, self._span, self._prune = target, span, prune
        self.pruner: Pruner

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_what_is_not_known(args)
        total = state.max_steps
        if self._span == "auto":
            steps = max(SPAN.tokens(total), min(SPAN_STEPS, total // 2))
        else:
            steps = round(self._span * total)
        self.pruner = Pruner(
            kwargs["model"],
            kwargs["optimizer"],
            target=self._target,
            steps=max(1, steps),
            process_group=torch.distributed.group.WORLD if args.world_size > 1 else None,
            **self._prune,
        )
        if state.global_step > 0:
            self._go_on(state)

    def _go_on(self, state: TrainerState) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        saved: Any = callbacks.get(type(self).__name__)
        if not isinstance(saved, dict) or not saved.get("attributes"):
            raise ValueError(
                f"the checkpoint of step {state.global_step} does not hold the state of one PruningCallback; resume "
                "from one that a Trainer with this callback has left, or train anew"
            )
        values = dict(saved["attributes"]["pruned"])
        tensors = load(b64decode(values.pop("tensors")))
        self.pruner.load_state_dict(values | {"tensors": tensors})

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json, last of all a checkpoint's files: the pruner's state_dict,
        its tensors as safetensors in base64."""
        if not hasattr(self, "pruner"):
            return {"args": {"target": self._target}, "attributes": {}}
        pruned = self.pruner.state_dict()
        pruned["tensors"] = b64encode(save(pruned["tensors"])).decode()
        return {"args": {"target": self._target}, "attributes": {"pruned": pruned}}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.observe()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.pruner.finished and state.is_world_process_zero:
            warnings.warn(
                f"training ended at {self.pruner.parameters:,} parameters, above the target: events are left undone; "
                "train longer, or lower span",
                stacklevel=2,
            )
        self.pruner.close()


def _refuse_what_is_not_known(args: TrainingArguments) -> None:
    """Raises ValueError for ways to train in which the weights are not where they are looked for, or are put back."""
    if args.n_gpu > 1:
        raise ValueError(
            "PruningCallback prunes on one device a process; start one process for each (torchrun or accelerate "
            "launch), or hide the others (CUDA_VISIBLE_DEVICES)"
        )
    kind = str(args.distributed_state.distributed_type.value) if args.distributed_state else "NO"
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise ValueError(
            f"PruningCallback does not know how {kind} shards a model; use DDP, or FSDP2 (fsdp_config with version 2)"
        )
    if getattr(args, "ddp_static_graph", None):  # since transformers 5
        raise ValueError("PruningCallback makes passes that ddp_static_graph does not allow for; leave that out")
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end may put back weights from before the last units fell; leave it out, and choose "
            "among the checkpoints by hand"
        )
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "PruningCallback takes up its state by itself, and restore_callback_states_from_checkpoint would put "
            "another in its place; leave that out"
        )
