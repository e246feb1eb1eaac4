"""The inputs of linear layers during a forward pass, for as long as the pass lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from efficientllm.models.experts import DOWN, UP, reader_module, seen_inputs
from efficientllm.models.parts import HEAD_WEIGHT, body
from efficientllm.pruning.dimensions import HIDDEN, LAYERS
from efficientllm.pruning.gates import GatePass, GateSums, Routed
from efficientllm.pruning.groups import Space
from efficientllm.pruning.readers import inputs_of_expert, reader_specs

Watch = Callable[[int], AbstractContextManager[object]]  # around a forward pass, told the first of its rows


def unwatched(_row: int) -> AbstractContextManager[object]:
    return nullcontext()


class Inputs(Mapping[str, Tensor]):
    """Captured inputs by weight name, each (tokens, inputs), detached, in the dtype of the forward pass.

    Layers that were given one tensor (q, k and v) get one tensor back. Calls are joined along the tokens. Those of an
    expert stand under its own name (inputs_of_expert), times the weight that the router has given to each. limit: of
    tokens. every: only every so-manieth row of (rows, length, inputs) is kept, whatever the micro-batches. waits: takes
    nothing but inside `taken` (a backward pass may compute a layer again). held: which tokens of the pass under way are
    none of padding, bool (rows, length); None: all.
    """

    def __init__(self, limit: int | None = None, every: int = 1, *, waits: bool = False) -> None:
        self._limit, self._every, self._open, self._skip = limit, every, not waits, 0
        self._calls: dict[str, list[Tensor]] = {}
        self._last: tuple[Tensor, int | None, Tensor] | None = None
        self._joined: dict[tuple[int, ...], Tensor] = {}
        self._seen: dict[str, int] = {}  # tokens of those that experts have been given
        self.held: Tensor | None = None

    @contextmanager
    def taken(self, row: int) -> Iterator[None]:
        """Around a forward pass whose first row is the row-th of all."""
        self._open, self._skip, self._last = True, -row % self._every, None
        try:
            yield
        finally:
            self._open, self._last = False, None

    def take(self, name: str, tensor: Tensor) -> None:
        if not self._open:
            return
        calls = self._calls.setdefault(name, [])
        left = None if self._limit is None else self._limit - sum(len(each) for each in calls)
        if left is not None and left <= 0:
            return
        if self._last is None or self._last[0] is not tensor or self._last[1] != left:
            kept, held = tensor.detach(), self.held
            if self._every > 1:
                kept = kept[self._skip :: self._every].clone()
                held = None if held is None else held[self._skip :: self._every]
            flat = kept.flatten(0, -2) if held is None else kept[held]
            # Only the last tensor is remembered: layers that share one are called one after the other.
            self._last = tensor, left, flat if left is None or left >= len(flat) else flat[:left].clone()
        calls.append(self._last[2])

    def take_experts(
        self, name: str, tensor: Tensor, weights: Tensor, routed: Routed, experts: int, length: int
    ) -> None:
        """The rows of a fused weight's experts, each its own; length: tokens of a row of the pass."""
        if not self._open:
            return
        tokens = torch.arange(routed.count, device=tensor.device)
        here = (tokens // length) % self._every == self._skip % self._every
        if self.held is not None:
            here &= self.held.flatten()
        left = routed.count if self._limit is None else max(0, self._limit - self._seen.get(name, 0))
        here &= here.cumsum(0) <= left
        self._seen[name] = self._seen.get(name, 0) + int(here.sum())
        rows = (tensor.detach() * weights.detach()).to(tensor.dtype)
        for expert in range(experts):
            own = rows[(routed.experts == expert) & here[routed.tokens]]
            self._calls.setdefault(inputs_of_expert(name, expert), []).append(own)
        self._calls.setdefault(name, [])

    def __getitem__(self, name: str) -> Tensor:
        if name in self._seen:
            return torch.cat([self[each] for each in self if each.startswith(f"{name}.")])
        calls = self._calls[name]
        if len(calls) == 1:
            return calls[0]
        key = tuple(id(each) for each in calls)
        if key not in self._joined:
            self._joined[key] = torch.cat(calls)
        self._calls[name] = [self._joined[key]]
        return self._joined[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)


@contextmanager
def captured_inputs(
    model: nn.Module, weights: Iterable[str], limit: int | None = None, *, every: int = 1, waits: bool = False
) -> Iterator[Inputs]:
    """Captures what the linear layers with these weight names are given while the body runs. limit, every, waits: as
    of Inputs. An LM head is given the last hidden states, whether a pass goes on to it or a chunked loss bypasses it.
    Tokens whose attention mask is 0 are left out.

    Hooks are gone afterwards, also after an error.
    """
    inputs = Inputs(limit, every, waits=waits)

    def hook_of(name: str) -> Any:
        return lambda module, args: inputs.take(name, args[0])

    def hold(_module: nn.Module, _args: object, given: Mapping[str, Any]) -> None:
        mask = given.get("attention_mask")
        inputs.held = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all() else None

    with ExitStack() as hooks:
        hooks.callback(body(model).register_forward_pre_hook(hold, with_kwargs=True).remove)
        for name in dict.fromkeys(weights):
            if name == HEAD_WEIGHT:
                hook = body(model).register_forward_hook(lambda module, args, out: inputs.take(HEAD_WEIGHT, out[0]))
            elif name.endswith(DOWN):
                hooks.enter_context(_captured_experts(model, name, inputs))
                continue
            else:
                hook = reader_module(model, name).register_forward_pre_hook(hook_of(name))
            hooks.callback(hook.remove)
        yield inputs


@contextmanager
def _captured_experts(model: nn.Module, name: str, inputs: Inputs) -> Iterator[None]:
    length, experts = 1, model.get_submodule(name.rpartition(".")[0])

    def measured(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal length
        length = args[0].shape[1]

    def see(tensor: Tensor, weights: Tensor, routed: Routed) -> None:
        inputs.take_experts(name, tensor, weights, routed, len(model.get_parameter(name)), length)

    handle = reader_module(model, name.removesuffix(DOWN) + UP).register_forward_pre_hook(measured)
    try:
        with seen_inputs(experts, see):
            yield
    finally:
        handle.remove()


@contextmanager
def watched_gates(model: nn.Module, space: Space, gates: GateSums) -> Iterator[Watch]:
    """While it lasts, backward passes add to `gates`. Yields what is to be entered around the forward pass of every
    micro-batch that counts; what is computed again in a backward pass does not count twice.

    Each linear layer's input stays in memory until the backward pass has come to it, with activation checkpointing too.
    """
    entered: GatePass | None = None
    last: tuple[Tensor, Tensor] | None = None  # what layers were given, and the view of it that they are given instead

    def watch(axis: str, layer: int | None, inputs: Tensor) -> Tensor:
        """A view of the inputs, whose gradient is that of its readers alone: the stem itself may be read."""
        nonlocal last
        # First: nothing that changes may become a guard of a caller's graph.
        if torch.compiler.is_compiling() or entered is None or not inputs.requires_grad:
            return inputs
        if last is not None and last[0] is inputs:  # q, k and v are given one tensor, one after the other
            return last[1]
        view = inputs.view_as(inputs)
        last, passed, kept = (inputs, view), entered, [inputs.detach()]

        def reached(gradient: Tensor) -> None:
            if kept:  # let go at once: the hook lives as long as the graph does
                gates.add(passed, axis, layer, kept.pop(), gradient)

        view.register_hook(reached)
        return view

    def watch_experts(axis: str, layer: int, inputs: Tensor, _weights: Tensor, routed: Routed) -> None:
        """x dL/dx is the same of what an expert reads and of that times the router's weight."""
        if entered is None or not inputs.requires_grad:
            return
        passed, kept = entered, [inputs.detach()]

        def reached(gradient: Tensor) -> None:
            if kept:
                gates.add_experts(passed, axis, layer, kept.pop(), gradient, routed)

        inputs.register_hook(reached)

    @contextmanager
    def counted(_row: int) -> Iterator[None]:
        nonlocal entered, last
        entered = gates.begin()
        try:
            yield
        finally:
            entered, last = None, None

    with _gate_hooks(model, space, watch, watch_experts):
        yield counted


@contextmanager
def _gate_hooks(
    model: nn.Module,
    space: Space,
    watch: Callable[[str, int | None, Tensor], Tensor],
    watch_experts: Callable[[str, int, Tensor, Tensor, Routed], None],
) -> Iterator[None]:
    """While it lasts, whatever linear layers read and layers add to the stem passes through these two."""

    def hook_of(axis: str, layer: int | None) -> Any:
        return lambda module, args: (watch(axis, layer, args[0]), *args[1:])

    def adds_to_stem(layer: int | None) -> Any:
        return lambda module, args, out: watch(LAYERS, layer, out)

    def before_head(module: nn.Module, args: Any, out: Any) -> None:
        """The head reads the last hidden states, tied or not, also where a chunked loss bypasses its module."""
        out["last_hidden_state"] = watch(HIDDEN, None, out[0])

    watched: set[nn.Module] = set()  # a router and its experts read what their block is given
    with ExitStack() as hooks:
        hooks.callback(body(model).register_forward_hook(before_head).remove)
        for spec in reader_specs(space):
            axis, layer = str(spec.inputs), spec.layer
            if spec.is_apart(-1):
                assert layer is not None
                see = partial(watch_experts, axis, layer)
                hooks.enter_context(seen_inputs(model.get_submodule(spec.name.rpartition(".")[0]), see))
            elif spec.name != HEAD_WEIGHT and (module := reader_module(model, spec.name)) not in watched:
                watched.add(module)
                hooks.callback(module.register_forward_pre_hook(hook_of(axis, layer)).remove)
        for spec in space.params:
            if spec.name in space.closing:
                module = model.get_submodule(spec.name.removesuffix(".weight"))
                hooks.callback(module.register_forward_hook(adds_to_stem(spec.layer)).remove)
        yield
