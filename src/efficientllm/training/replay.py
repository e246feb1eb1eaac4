"""Passes over the batch that somebody else's loop is at: by their function, or by their last forward call again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efficientllm.pruning.gates import GateSums
from efficientllm.training.capture import Watch, watched_gates
from efficientllm.training.looks import Rows
from efficientllm.training.state import TrainState
from efficientllm.training.step import Passes, Use

ONE = torch.zeros(1, 2, dtype=torch.int64)  # a row with one prediction stands for the batch: its loss is a mean already


class Replay:
    """Runs the model's last forward call again: what the pruner measures and refreshes on.

    Keeps references to that call's inputs, and its autocast, until the next one. Used where the caller gives no loss
    function.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._replaying = False
        self._hook = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._replaying and module.training:
            # A count of labels in a larger batch would rescale the loss of this call alone.
            self._call = args, {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}
            device = self._model.device.type
            self._autocast = nullcontext
            if torch.is_autocast_enabled(device):
                self._autocast = partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device))

    def __call__(self) -> Tensor:
        if self._call is None:
            raise ValueError("pruner.step() was called before any forward pass in training mode; train a step first")
        args, kwargs = self._call
        self._replaying = True
        try:
            with self._autocast():
                loss = getattr(self._model(*args, **kwargs), "loss", None)
        finally:
            self._replaying = False
        if loss is None:
            raise ValueError(
                "the model's forward call returns no loss; pass labels to it, or loss_fn=lambda: <loss of the current "
                "batch> to Pruner"
            )
        return loss

    def remove(self) -> None:
        self._hook.remove()


class CurrentBatch(Passes):
    """Every look is at the caller's own batch. tokens: whose inputs are kept; loss: of that batch, a mean, with its
    graph; default: the last forward call's.

    Where a criterion wants gates, the caller's own passes in training mode are watched in steps with events, so that no
    other is needed for them; under fp16 autocast a look of its own is taken.
    """

    def __init__(self, state: TrainState, tokens: int, loss: Callable[[], Tensor] | None) -> None:
        super().__init__(state)
        self.tokens = tokens
        self._hooks, self._looking, self._watched = ExitStack(), False, -1
        self._replay = Replay(state.model) if loss is None else None
        self._loss = loss or self._replay
        if state.pruner and "gates" in state.pruner.looks.needs:
            self._gates = GateSums(state.space, state.device)
            self._watch(self._hooks.enter_context(watched_gates(state.model, state.space, self._gates)))

    def _watch(self, watch: Watch) -> None:
        """Enters `watch` around every forward call of the caller's that a backward pass may follow."""
        call = ExitStack()

        def before(module: torch.nn.Module, _args: object) -> None:
            call.close()  # where the call before has failed
            step, pruner = self.state.step, self.state.pruner
            if not (module.training and torch.is_grad_enabled() and not self._looking and pruner and self._gates):
                return
            if not pruner.due(step + 1) or self._is_scaled():
                return
            if self._watched != step:  # what was seen in an earlier step is of other weights
                self._gates.take()
            self._watched = step
            call.enter_context(watch(0))

        self._hooks.callback(self.state.model.register_forward_pre_hook(before).remove)
        self._hooks.callback(self.state.model.register_forward_hook(lambda *_: call.close()).remove)

    def gates(self) -> GateSums | None:
        """Those of the caller's passes since the last look."""
        return self._gates.take() if self._gates is not None else None

    def _is_scaled(self) -> bool:
        """Whether the caller's loss is likely to be multiplied against underflow, and its gates with it, squared."""
        kind = self.state.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16

    def rows(self, use: Use) -> Rows:
        return Rows([(ONE, True)], self._of_batch, limit=self.tokens)

    def _of_batch(self, rows: Tensor) -> Tensor:
        assert self._loss is not None
        self._looking = True
        try:
            return self._loss().reshape(())
        finally:
            self._looking = False

    def close(self) -> None:
        """Lets go of the model."""
        self._hooks.close()
        if self._replay:
            self._replay.remove()
