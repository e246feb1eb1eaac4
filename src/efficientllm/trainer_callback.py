"""The method inside transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from efficientllm.library import Pruner


class PruningCallback(TrainerCallback):
    """Prunes the Trainer's model while it trains, over the first `span` of its steps.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback := PruningCallback(target="40%")])
        trainer.train()
        callback.pruner.save_pretrained("compact")

    Keywords as Pruner's. The Trainer clips before the saliency is taken, which rescales all scores of a step alike.
    One process; the Trainer's own checkpoints hold the zeroed model at its full shape.
    """

    def __init__(self, *, target: Any, span: float = 0.15, **prune: Any) -> None:
        if not 0.0 < span <= 1.0:
            raise ValueError(f"span is {span}; it is the share of the training steps over which to prune, in (0, 1]")
        self._target, self._span, self._prune = target, span, prune
        self.pruner: Pruner

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "PruningCallback runs in one process on one device; hide the others (CUDA_VISIBLE_DEVICES)"
            )
        if state.global_step > 0:
            raise ValueError("PruningCallback cannot resume a Trainer checkpoint; use `efficientllm prune`, which can")
        steps = max(1, round(self._span * state.max_steps))
        self.pruner = Pruner(kwargs["model"], kwargs["optimizer"], target=self._target, steps=steps, **self._prune)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.observe()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.step()
