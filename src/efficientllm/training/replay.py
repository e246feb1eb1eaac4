"""Passes over the batch that somebody else's loop is at: by their function, or by their last forward call again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from efficientllm.models.parts import body
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.shards import fill
from efficientllm.training.chunked_loss import IGNORED
from efficientllm.training.hooks import Inputs, Watch, captured_inputs, watched_gates
from efficientllm.training.passes import Pass, Passes, Use
from efficientllm.training.state import TrainState

BATCH = torch.zeros(1, 0, dtype=torch.int64)  # stands for the rows of the batch, which only the caller knows


class Replay:
    """Remembers the model's last forward call in training mode, and runs it again: what the pruner looks at anew.

    Keeps references to that call's inputs, and its autocast, until the next one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.running = False
        self._hook = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.running and module.training:
            # A count of labels in a larger batch would rescale the loss of this call alone.
            self._call = args, {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}
            device = self._model.device.type
            self._autocast = nullcontext
            if torch.is_autocast_enabled(device):
                self._autocast = partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device))

    @property
    def counted(self) -> int | None:
        """Next tokens in the loss of the call, neither masked (label -100) nor, where it has no labels, padding; None
        where it does not say."""
        given = self._call[1] if self._call else {}
        for name, shift in (("shift_labels", 0), ("labels", 1)):
            if given.get(name) is not None:
                return int((given[name][..., shift:] != IGNORED).sum())
        mask = given.get("attention_mask")
        if torch.is_tensor(mask) and mask.ndim == 2:
            return int((mask[:, 1:] * mask[:, :-1]).count_nonzero())
        return None

    def __call__(self) -> Tensor:
        if self._call is None:
            raise ValueError("pruner.step() was called before any forward pass in training mode; train a step first")
        args, kwargs = self._call
        with self._autocast():
            loss = getattr(self._model(*args, **kwargs), "loss", None)
        if loss is None:
            raise ValueError(
                "the model's forward call returns no loss; pass labels to it, or loss_fn=lambda: <loss of the current "
                "batch> to Pruner"
            )
        return loss

    def remove(self) -> None:
        self._hook.remove()


class CurrentBatch(Passes):
    """Every look is at the caller's own batch. tokens: whose inputs are kept, over all processes; loss: of that batch,
    a mean, with its graph; default: the last forward call's. With several processes each has rows of the batch, which
    weigh by what is predicted in them (alike where `loss` is the caller's).

    Where a criterion wants gates, the caller's own passes in training mode are watched in steps with events, so that no
    other is needed for them; where they are compiled, or under fp16 autocast, a look of its own is taken, without the
    compiler.
    """

    def __init__(self, state: TrainState, tokens: int, loss: Callable[[], Tensor] | None) -> None:
        super().__init__(state)
        self.tokens = tokens
        self._hooks, self._watched, self._clean = ExitStack(), -1, set[str]()
        self._replay = Replay(state.model)
        self._hooks.callback(self._replay.remove)
        self._weighs = loss is None and state.ranks.world > 1
        self._loss = loss or self._replay
        if state.pruner and "gates" in state.pruner.looks.needs:
            self._gates = GateSums(state.space, state.device)
            self._watch(self._hooks.enter_context(watched_gates(state.model, state.space, self._gates)))
        self.hold()

    def _watch(self, watch: Watch) -> None:
        """Enters `watch` around every forward call of the caller's that a backward pass may follow."""
        call, inner = ExitStack(), body(self.state.model)

        def before(module: nn.Module, _args: object) -> None:
            if torch.compiler.is_compiling():
                return
            call.close()  # where the call before has failed
            step, pruner = self.state.step, self.state.pruner
            looking = self._replay.running or not (module.training and torch.is_grad_enabled())
            if looking or pruner is None or self._gates is None:
                return
            if not pruner.due(step + 1) or self._is_scaled() or _is_compiled(self.state.model):
                return
            if self._watched != step:  # what was seen in an earlier step is of other weights
                self._gates.take()
            self._watched = step
            self._gates.counted = self._replay.counted
            call.enter_context(watch(0))

        def after(*_: object) -> None:
            if not torch.compiler.is_compiling():
                call.close()

        # Inside the body, so that an autocast which accelerate has put around the model's forward is seen.
        self._hooks.callback(inner.register_forward_pre_hook(before).remove)
        self._hooks.callback(inner.register_forward_hook(after).remove)

    def hold(self) -> None:
        """From now on what is dead gets no gradient: a caller that clips before observe() sees none either. Shards and
        copies that are to be averaged are cleared alike."""
        pruner = self.state.pruner
        assert pruner is not None
        for name in sorted({part.name for part in pruner.held} - self._clean):
            weight = pruner.params[name]  # a shard, where the model may hold what has been gathered
            if weight.requires_grad:
                hook = weight.register_post_accumulate_grad_hook(partial(self._clear, name))
                self._hooks.callback(hook.remove)
            self._clean.add(name)

    def _clear(self, name: str, weight: Tensor) -> None:
        for part in self.state.pruner.held if self.state.pruner else ():
            if part.name == name and weight.grad is not None:
                fill(weight.grad, part.dim, part.indices, part.rows)

    def gates(self) -> GateSums | None:
        """Those of the caller's passes since the last look."""
        return self._gates.take() if self._gates is not None else None

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Mapping[str, Tensor]:
        """As of Passes. Copies of the weights are averaged here, because the caller's wrapper sums what its own forward
        calls lead to and no other; FSDP2 sums shards by itself."""
        if gates is not None:
            gates.counted = self._replay.counted
        with self._eager():
            kept = super().gradient(names, gates)
        ranks, pruner = self.state.ranks, self.state.pruner
        if ranks.world > 1 and ranks.mesh is None and pruner and "gradient" in pruner.looks.needs:
            for weight in self.state.model.parameters():
                if weight.requires_grad:  # an expert may have been asked on other processes alone
                    own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    weight.grad = ranks.over_batch(own).div_(ranks.world)
        return kept

    def _is_scaled(self) -> bool:
        """Whether the caller's loss is likely to be multiplied against underflow, and its gates with it, squared."""
        kind = self.state.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16

    def rows(self, use: Use) -> Pass:
        ranks, weight = self.state.ranks, 1.0
        if self._weighs and use != "inputs":
            counted = self._replay.counted
            own = torch.tensor([1.0 if counted is None else counted], dtype=torch.float64)
            weight = float(own * ranks.world / ranks.over_batch(own.clone()))
        # Each process's loss is a mean already: as if it predicted one token.
        return Pass([(BATCH, True)], partial(self._of_batch, weight), predicted=ranks.world)

    def keeping(self, use: Use, names: Sequence[str]) -> AbstractContextManager[Inputs]:
        limit = -(-self.tokens // self.state.ranks.world)
        return captured_inputs(self.state.model, names, limit, waits=True)

    def _of_batch(self, weight: float, _rows: Tensor) -> Tensor:
        self._replay.running = True
        try:
            with self._eager():
                return self._loss().reshape(()) * weight
        finally:
            self._replay.running = False

    def _eager(self) -> AbstractContextManager[object]:
        """Around passes whose hooks must be seen, and what they compute again."""
        compiled = _is_compiled(self.state.model)
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def close(self) -> None:
        """Lets go of the model."""
        self._hooks.close()


def _is_compiled(model: nn.Module) -> bool:
    """Whether some of its modules run compiled, by compile(), as torch.compile's modules or by their forward."""
    return any(
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )
