"""Floating-point operations of a model's passes, from its space alone: no weights, nothing measured.

Counted as torch.utils.flop_counter.FlopCounterMode counts: matrix products at two operations a multiply-add, the
attention of an SDPA kernel over the whole square of positions (the causal half is not subtracted), whose backward pass
recomputes the scores (five products to the forward's two). Everything elementwise counts as nothing: norms, softmax,
embedding lookups, the optimizer, the scores of element criteria.

Widths are the allocated ones: a zeroed unit is computed until it is cut. Of experts those count that a token uses.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from efficientllm.pruning.dimensions import QUERY
from efficientllm.pruning.groups import Space
from efficientllm.pruning.widths import Widths

BACKWARD_LINEAR = 2.0  # gradients of the inputs and of the weights, each as large as the forward product
BACKWARD_ATTENTION = 2.5
BACKWARD_EAGER = 2.0  # without a kernel of its own: nothing is computed again


@dataclass(frozen=True)
class ForwardFlops:
    """One forward pass: linear layers of the decoder layers, attention (scores and values), LM head.

    last_linear: the part of `linear` that each layer does last (down_proj), which recomputation need not repeat; none
    where a norm follows it.
    backward_attention: attention's products in the backward pass, as a multiple of the forward pass's.
    """

    linear: int
    attention: int
    head: int
    last_linear: int
    backward_attention: float = BACKWARD_ATTENTION

    @property
    def base(self) -> int:
        """Without the LM head."""
        return self.linear + self.attention

    @property
    def total(self) -> int:
        return self.base + self.head


@lru_cache(256)  # every step asks for the same few passes
def forward_flops(space: Space, rows: int, length: int, widths: Widths | None = None) -> ForwardFlops:
    """A forward pass over `rows` rows of `length` tokens at `widths` (default: the space's own)."""
    return _forward(space, rows, length, space.widths if widths is None else widths)


def _forward(space: Space, rows: int, length: int, widths: Any) -> ForwardFlops:
    """Elementwise where the fields of the widths are int64 tensors."""
    tokens = rows * length
    matrices = Counter((spec.layer is not None, spec.axes) for spec in space.params if len(spec.axes) > 1)
    in_layers = [spec.axes for spec in space.params if spec.layer == 0 and len(spec.axes) > 1]  # in order of use
    linear = last = head = 0
    for (layered, axes), number in matrices.items():
        product = 2 * tokens * math.prod(space.active_length(axes, dim, widths) for dim in range(len(axes)))
        if layered:
            linear += number // space.widths.layers * widths.layers * product
            # What experts give is weighed by the router, whose gradient needs it.
            last += widths.layers * product if axes == in_layers[-1] and len(axes) == 2 and not space.closing else 0
        else:  # the embedding, and the LM head of the same shape; where they are tied it is one matrix
            head = product
    attention = 4 * rows * widths.layers * space.axis_length(QUERY, widths) * length**2  # scores and values
    return ForwardFlops(linear, attention, head, last, BACKWARD_EAGER if space.eager else BACKWARD_ATTENTION)


@dataclass(frozen=True)
class FlopsPerToken:
    """The cost of pruning/costs.py: forward FLOPs of a token, the mean over a row of `length`, LM head included."""

    space: Space
    length: int
    name: str = "flops"
    unit: str = "FLOPs per token"

    @property
    def key(self) -> str:
        return f"{self.name} at {self.length}"

    def __call__(self, widths: Any) -> Any:
        return _forward(self.space, 1, self.length, widths).total // self.length


def training_flops(forward: ForwardFlops, *, gradient_checkpointing: bool = False, chunked: bool = False) -> int:
    """Forward and backward pass of the rows that `forward` was counted for: a step's whole batch, or a refresh.

    gradient_checkpointing: each layer is computed again in the backward pass, up to its last linear layer, whose
    result nothing needs (torch.utils.checkpoint stops there). chunked: the loss makes the logits chunk by chunk and
    again in the backward pass (training/distillation.py). The chunked loss without a teacher repeats nothing
    (training/chunked_loss.py).
    """
    linear = (1.0 + BACKWARD_LINEAR) * forward.linear
    attention = (1.0 + forward.backward_attention) * forward.attention
    head = (1.0 + BACKWARD_LINEAR + chunked) * forward.head
    again = forward.base - forward.last_linear if gradient_checkpointing else 0
    return int(linear + attention + head) + again


def teacher_flops(forward: ForwardFlops, *, keeps: bool = False) -> int:
    """What a teacher adds to a step on the same rows. A live one makes its logits twice, as the student does.

    keeps: a teacher whose draws are kept on disk, counted as if it were asked once for every row, so that
    the figure does not depend on what earlier runs have left there.
    """
    return forward.total if keeps else forward.total + forward.head


def prefill_flops(space: Space, rows: int, length: int) -> int:
    """Processing `rows` prompts of `length` tokens, with logits for the last position of each alone."""
    forward = forward_flops(space, rows, length)
    return forward.base + forward.head // length


def decode_flops(space: Space, attended: int) -> int:
    """One more token of one sequence, from the cache of those before it.

    attended: positions that the token attends to, itself included, summed over the layers (layers x context where no
    layer has a sliding window).
    """
    forward = forward_flops(space, 1, 1)
    return forward.linear + 4 * space.widths.heads * space.head_dim * attended + forward.head
