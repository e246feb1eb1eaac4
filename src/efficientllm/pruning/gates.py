"""Gate Fisher: what closing a unit would cost, from the gradient of its gate at every token.

A gate c_u = 1 multiplies unit u wherever it is read. At token t its gradient is g_tu, the sum of x dL/dx over the
unit's entries in the inputs x of the layers that read them, with L the loss summed over tokens. Half the mean of its
square over tokens, F_u = mean_t(g_tu^2) / 2, is the diagonal of the gate's empirical Fisher information and estimates
the loss increase in nats of closing it (arXiv 2204.09656, section 4.1: the second-order term of the loss in the masks,
its Hessian replaced by the Fisher). A layer's gate is where it adds to the stem: at the inputs of its o_proj and
down_proj, or where norms follow those, at the outputs of these norms.

Deviations: the paper squares the gradient of a whole sample, which grows with the sample's length; here every token's
own is squared, so that the score hardly depends on how many tokens a look takes. The stem's units, which the paper does
not have, are gated at all norms' outputs at once. And no token outweighs the rest: the gate gradients of a pass, of one
layer where units are a layer's, are scaled down to the norm that a hundredth of the tokens reach (`bounded`). The
first tokens of a text, which heads park their attention on (arXiv 2309.17453, 2402.17762), can have squares a million
times all others': two of them made a pass's scores 20 to 3,000 times as large, by type, and chose the shape of a run
(docs/results/smollm2.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientllm.pruning.dimensions import DIMENSIONS, EXPERT, LAYERS
from efficientllm.pruning.groups import Space
from efficientllm.pruning.live import mask_shapes
from efficientllm.pruning.shards import ALONE, World


@dataclass(frozen=True)
class Routed:
    """Which expert each row of an input belongs to, and which of so many tokens; int64 (rows,) both."""

    experts: Tensor
    tokens: Tensor
    count: int


LARGEST = 100  # one token in so many is bounded, those of the largest norm


def bounded(gradients: Tensor) -> Tensor:
    """Gate gradients (tokens, ...) in fp32, those of the hundredth of the tokens with the largest norms scaled down to
    the least of these norms. Tokens of no gradient are not counted; fewer than 200 stay as they are, and so does what
    is not finite.
    """
    if len(gradients) < 2 * LARGEST:
        return gradients
    squares = gradients.reshape(len(gradients), -1).square().sum(1)
    place = ((squares > 0).sum() // LARGEST - 1).clamp(min=0)
    limit = squares.sort(descending=True).values.gather(0, place[None])  # an index would wait for a GPU to say it
    return gradients * (limit / squares).sqrt().clamp(max=1.0).nan_to_num(1.0).view(-1, *[1] * (gradients.ndim - 1))


class GatePass:
    """One forward pass and the backward pass that follows it: gate gradients (tokens, units) of the units that many
    layers read, added up token by token. counted: as of GateSums."""

    def __init__(self, counted: int | None) -> None:
        self.joint: dict[str, Tensor] = {}
        self.counted = counted
        self.predicted = 0  # next tokens in its loss, once the backward pass has come to it

    def add(self, name: str, products: Tensor, units: int, first: int = 0) -> None:
        """products: (tokens, some units), from unit `first` on, of so many."""
        if name not in self.joint:
            self.joint[name] = products.new_zeros(len(products), units)
        self.joint[name][:, first : first + products.shape[1]] += products


class GateSums:
    """Adds up squared gate gradients over the passes of a look, on the model's device, in fp32.

    `begin` a pass before its forward pass and `add` every distinct input x of its linear layers during the backward
    pass. A token that is not predicted (padding, a masked label) is none of the n; its squares are what later tokens'
    losses have left in it, none for padding. Units of one layer (FFN channels, heads) are read from one x; those of the
    model (residual channels, layers) from many, which are added up before they are squared.
    """

    def __init__(self, space: Space, device: torch.device) -> None:
        self._shapes, self._closing = dict(mask_shapes(space.widths)), bool(space.closing)
        self._squares = {name: torch.zeros(shape, device=device) for name, shape in self._shapes.items()}
        self._open: list[GatePass] = []
        self._predicted = 0  # in the passes closed
        self._empty = True
        self.counted: int | None = None  # next tokens in the loss of a pass to come; None: all of its rows

    def begin(self) -> GatePass:
        """A new pass. Those before it that a backward pass has reached are over."""
        self._close()
        self._open.append(GatePass(self.counted))
        return self._open[-1]

    @torch.no_grad()
    def add(self, passed: GatePass, axis: str, layer: int | None, inputs: Tensor, gradient: Tensor) -> None:
        """inputs: x, (rows, length, entries of the axis), of a layer's readers or of the model's, or with LAYERS for an
        axis what the layer adds to the stem; gradient: of the mean loss in x."""
        passed.predicted = inputs.shape[0] * (inputs.shape[1] - 1) if passed.counted is None else passed.counted
        self._empty = False
        products = (inputs.float() * gradient.float()).flatten(0, -2)
        if axis == LAYERS:
            assert layer is not None
            passed.add(LAYERS, products.sum(1, keepdim=True), self._shapes[LAYERS][0], layer)
            return
        if not DIMENSIONS[axis].within:
            passed.add(axis, products, products.shape[1])
            return
        assert layer is not None
        for name in DIMENSIONS[axis].chain:
            if name == LAYERS:
                if not self._closing:
                    passed.add(LAYERS, products.sum(1, keepdim=True), self._shapes[LAYERS][0], layer)
            else:
                units = products.view(len(products), *self._shapes[name][1:], -1).sum(-1)
                self._squares[name][layer] += bounded(units).square().sum(0)

    @torch.no_grad()
    def add_experts(
        self, passed: GatePass, axis: str, layer: int, inputs: Tensor, gradient: Tensor, routed: Routed
    ) -> None:
        """As `add`, of the experts of a layer: x is (rows, entries of one expert), a row for each token of each."""
        products = inputs.float() * gradient.float()
        own = products.sum(1)
        whole = own.new_zeros(routed.count).index_add_(0, routed.tokens, own)
        passed.add(LAYERS, whole[:, None], self._shapes[LAYERS][0], layer)
        for name, gates in ((EXPERT, own), (axis, products)):
            self._squares[name][layer].index_add_(0, routed.experts, bounded(gates).square())

    @torch.no_grad()
    def _close(self) -> None:
        for passed in self._open:
            for name, gradients in passed.joint.items():
                self._squares[name] += bounded(gradients).square().sum(0)
            self._predicted += passed.predicted
        self._open = [passed for passed in self._open if not passed.joint]

    def take(self) -> GateSums | None:
        """What there is so far, and begins anew; None where nothing has been added."""
        self._close()
        self._open = []
        if self._empty:  # whatever is predicted: with several processes all must say the same
            return None
        sums = copy(self)
        self._squares = {name: torch.zeros_like(each) for name, each in self._squares.items()}
        self._predicted, self._empty = 0, True
        return sums

    def scores(self, world: World = ALONE) -> Mapping[str, Tensor]:
        """F of every unit of every type, fp32 (rows, units), for the mean loss over the look's predicted tokens.

        With n predictions over all of w processes, each of which has the gradient of w / n times its own summed loss, F
        is n / (2 w^2) times the squares summed over all of them (w = 1: the gradient of a mean is 1 / n of the sum's).
        """
        self._close()
        names = list(self._squares)
        counted = torch.tensor([float(self._predicted)], device=self._squares[names[0]].device)
        packed = world.over_batch(torch.cat([counted, *(self._squares[name].flatten() for name in names)]))
        packed = packed[1:] * (packed[0] / (2 * world.world**2))
        parts = packed.split([self._squares[name].numel() for name in names])
        scores = {}
        for name, part in zip(names, parts, strict=True):
            shape = self._shapes[name]
            scores[DIMENSIONS[name].type] = part.view(-1, shape[-1]) if len(shape) > 1 else part[None]
        return scores
