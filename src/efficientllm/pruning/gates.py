"""Gate Fisher: what closing a unit would cost, from the gradient of its gate at every token.

A gate c_u = 1 multiplies unit u wherever it is read. At token t its gradient is g_tu, the sum of x dL/dx over the
unit's entries in the inputs x of the layers that read them, with L the loss summed over tokens. Half the mean of its
square over tokens, F_u = mean_t(g_tu^2) / 2, is the diagonal of the gate's empirical Fisher information and estimates
the loss increase in nats of closing it (arXiv 2204.09656, section 4.1: the second-order term of the loss in the masks,
its Hessian replaced by the Fisher).

Deviations: the paper squares the gradient of a whole sample, which grows with the sample's length; here every token's
own is squared, so that the score hardly depends on how many tokens a look takes. The stem's units, which the paper does
not have, are gated at all norms' outputs at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS, LAYERS
from efficientllm.pruning.groups import Space, mask_shapes
from efficientllm.pruning.shards import ALONE, World


class GateSums:
    """Adds up squared gate gradients over the micro-batches of a look, on the model's device, in fp32.

    Call `add` once for every distinct input x of a linear layer during a micro-batch's backward pass, and `close` after
    it. Units of one layer (FFN channels, heads) are read from one x; those of the model (residual channels, layers)
    from many, which are added up token by token before they are squared.
    """

    def __init__(self, space: Space, device: torch.device) -> None:
        self._shapes = dict(mask_shapes(space.widths))
        self._squares = {name: torch.zeros(shape, device=device) for name, shape in self._shapes.items()}
        self._joint: dict[str, Tensor] = {}  # (tokens, units) of the micro-batch at hand
        self._tokens = 0  # in the micro-batches closed

    @torch.no_grad()
    def add(self, axis: str, layer: int | None, inputs: Tensor, gradient: Tensor) -> None:
        """inputs: x, (..., length of the axis), of a layer's readers or of the model's; gradient: of the mean loss."""
        products = (inputs.float() * gradient.float()).flatten(0, -2)
        if not DIMENSIONS[axis].within:
            self._add_jointly(axis, products)
            return
        assert layer is not None
        for name in DIMENSIONS[axis].chain:
            if name == LAYERS:
                self._add_jointly(LAYERS, products.sum(1, keepdim=True), layer)
            else:
                units = products.view(len(products), *self._shapes[name][1:], -1).sum(-1)
                self._squares[name][layer] += units.square().sum(0)

    def _add_jointly(self, name: str, products: Tensor, first: int = 0) -> None:
        if name not in self._joint:
            self._joint[name] = products.new_zeros(len(products), *self._shapes[name])
        self._joint[name][:, first : first + products.shape[1]] += products

    @torch.no_grad()
    def close(self) -> None:
        """The micro-batch is over."""
        for name, gradients in self._joint.items():
            self._squares[name] += gradients.square().sum(0)
        if self._joint:
            self._tokens += len(next(iter(self._joint.values())))
        self._joint = {}

    def handed_over(self) -> GateSums | None:
        """What there is so far, and begins anew; None where nothing has been added."""
        self.close()
        if not self._tokens:
            return None
        sums = copy(self)
        self._squares = {name: torch.zeros_like(each) for name, each in self._squares.items()}
        self._tokens = 0
        return sums

    def scores(self, reduction: World = ALONE) -> Mapping[str, Tensor]:
        """F of every unit of every type, fp32 (rows, units), for the mean loss over the look's tokens.

        The gradient of a mean over n tokens is 1/n of the sum's, so that n / 2 times its summed squares is meant; n is
        of one process, whose gradients are of its own mean, and the processes' scores are averaged.
        """
        self.close()
        names = list(self._squares)
        packed = torch.cat([self._squares[name].flatten() for name in names]) * (self._tokens / 2)
        packed = reduction.over_batch(packed) / reduction.world
        parts = packed.split([self._squares[name].numel() for name in names])
        scores = {}
        for name, part in zip(names, parts, strict=True):
            shape = self._shapes[name]
            scores[DIMENSIONS[name].type] = part.view(-1, shape[-1]) if len(shape) > 1 else part[None]
        return scores
