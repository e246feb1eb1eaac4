"""The method inside transformers' Trainer."""

from __future__ import annotations

from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from efficientllm.config.sections import SPAN, SPAN_STEPS
from efficientllm.library import Pruner


class PruningCallback(TrainerCallback):
    """Prunes the Trainer's model while it trains, over the first `span` (a share) of its steps; auto: 15 %, but no
    fewer than 20 steps, as far as half of them allows (prune.end in a recipe).

        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback := PruningCallback(target="40%")])
        trainer.train()
        callback.pruner.save_pretrained("compact")

    Keywords as Pruner's. The Trainer clips before the saliency is taken, which rescales all scores of a step alike.
    One process; the Trainer's own checkpoints hold the zeroed model at its full shape.
    """

    def __init__(self, *, target: Any, span: float | Literal["auto"] = "auto", **prune: Any) -> None:
        if span != "auto" and not (isinstance(span, float | int) and 0.0 < span <= 1.0):
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
        total = state.max_steps
        if self._span == "auto":
            steps = max(SPAN.tokens(total), min(SPAN_STEPS, total // 2))
        else:
            steps = round(self._span * total)
        self.pruner = Pruner(
            kwargs["model"], kwargs["optimizer"], target=self._target, steps=max(1, steps), **self._prune
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.observe()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.step()
