"""The inputs of linear layers during a forward pass, for as long as the pass lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Inputs(Mapping[str, Tensor]):
    """Captured inputs by weight name, each (tokens, inputs), detached, in the dtype of the forward pass.

    Layers that were given one tensor (q, k and v) get one tensor back. Calls are joined along the tokens.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._calls: dict[str, list[Tensor]] = {}
        self._last: tuple[Tensor, int | None, Tensor] | None = None
        self._joined: dict[tuple[int, ...], Tensor] = {}

    def take(self, name: str, tensor: Tensor) -> None:
        calls = self._calls.setdefault(name, [])
        left = None if self._limit is None else self._limit - sum(len(each) for each in calls)
        if left is not None and left <= 0:
            return
        if self._last is None or self._last[0] is not tensor or self._last[1] != left:
            flat = tensor.detach().flatten(0, -2)
            # Only the last tensor is remembered: layers that share one are called one after the other.
            self._last = tensor, left, flat if left is None or left >= len(flat) else flat[:left].clone()
        calls.append(self._last[2])

    def __getitem__(self, name: str) -> Tensor:
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
def captured_inputs(model: nn.Module, weights: Iterable[str], limit: int | None = None) -> Iterator[Inputs]:
    """Captures what the linear layers with these weight names are given while the body runs, at most `limit` tokens.

    Hooks are gone afterwards, also after an error.
    """
    inputs, handles = Inputs(limit), []

    def hook_of(name: str) -> Any:
        return lambda module, args: inputs.take(name, args[0])

    try:
        for name in weights:
            module = model.get_submodule(name.removesuffix(".weight"))
            handles.append(module.register_forward_pre_hook(hook_of(name)))
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
