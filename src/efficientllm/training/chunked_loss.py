"""Cross-entropy of a linear head, chunk by chunk: the logits of all tokens never stand in memory together.

    L = sum_t logsumexp(z_t) - z_t[y_t],    z = W h,    dL/dz_t = softmax(z_t) - onehot(y_t)

or, capped, z = c tanh(W h / c), where the gradient of W h is that of z times 1 - (z / c)^2.

The gradient of the logits is known as soon as they are, so both products of the backward pass are made in the forward
pass, while a chunk's logits are at hand (as in Liger Kernel, arXiv 2410.10989, sec. 3.2): no product is repeated, and a
step costs as many operations as with the plain loss. Gradients of several chunks add up in fp32 at least.

Measured against recomputation and torch.nn.functional.linear_cross_entropy in docs/results/loss.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_BYTES = 2**29  # of a chunk's logits in fp32; about three times that stands in memory
AUTO_BYTES = 2**30  # of a micro-batch's logits in fp32, from which `auto` chunks on a GPU
CHUNK_TOKENS = 1024  # whose logits stand in memory at once: of model and teacher, of text in two encodings
IGNORED = -100  # label of a token that is not in the loss, to transformers and to data/planes.py as well


def is_chunked(wanted: str, device_type: str, tokens: int, vocabulary: int) -> bool:
    """Whether train.loss, `wanted`, means chunks for micro-batches of so many tokens.

    auto: not on a CPU; elsewhere where fp32 logits of a micro-batch would take more than AUTO_BYTES.
    """
    if wanted == "auto":
        return device_type != "cpu" and 4 * tokens * vocabulary > AUTO_BYTES
    return wanted == "chunked"


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of a chunk: the largest power of two whose fp32 logits take at most CHUNK_BYTES, at least 1."""
    return 1 << max(0, (CHUNK_BYTES // (4 * vocabulary)).bit_length() - 1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float | None = None
) -> Tensor:
    """Summed cross-entropy of labels (tokens,) under logits hidden @ weight.T, in nats; scalar, fp32 or fp64.

    hidden: (tokens, width), in the dtype of computation. weight: (vocabulary, width), of any floating dtype. labels:
    int64, -100 where a token does not count. chunk: tokens whose logits stand in memory at once. cap: logits are
    cap * tanh(logits / cap). Its gradient can be taken once, and not differentiated again.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk, cap, wants_gradient)
    return total


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float | None = None) -> Tensor:
    """As linear_cross_entropy, of each token (tokens,), 0 where it does not count; without gradient."""
    weight = weight.to(hidden.dtype)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    logits = ((_logits(part, weight, cap), own) for part, own in parts)
    return torch.cat([functional.nll_loss(_log_softmax(each), own, reduction="none") for each, own in logits])


def _logits(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    logits = functional.linear(hidden, weight)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, cap: float | None, wants_gradient: bool
    ) -> Tensor:
        like = weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if wants_gradient:
            hidden_gradient = torch.empty_like(hidden)
            weight_gradient = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for first in range(0, len(hidden), chunk):
            part, own = hidden[first : first + chunk], labels[first : first + chunk]
            logits = _logits(part, like, cap)
            logs = _log_softmax(logits)
            tilt = None if cap is None else 1.0 - logits.div_(cap).square_()
            del logits
            loss += functional.nll_loss(logs, own, reduction="sum")
            if wants_gradient:
                slope = _slope(logs, own).to(hidden.dtype)
                del logs
                if tilt is not None:
                    slope *= tilt
                torch.mm(slope, like, out=hidden_gradient[first : first + chunk])
                _add_product(weight_gradient, slope.t(), part)
                del slope
        if wants_gradient:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            hidden_gradient.mul_(upstream),
            weight_gradient.mul_(upstream).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def _slope(logs: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the logits from their log-softmax (tokens, vocabulary), which it overwrites."""
    counts = (labels != IGNORED).unsqueeze(1).to(logs.dtype)
    return logs.exp_().mul_(counts).scatter_add_(1, labels.clamp(min=0).unsqueeze(1), -counts)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right
