"""One batch: its loss, its gradient, the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Forward = Callable[..., object]
SummedLoss = Callable[[Tensor], Tensor]  # of rows (rows, length), over every next token


@dataclass(frozen=True)
class Precision:
    """bf16 autocast over fp32 master weights, or plain fp32."""

    device_type: str
    bf16: bool

    @property
    def name(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    def context(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device_type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    @classmethod
    def choose(cls, wanted: str, device: torch.device) -> Precision:
        """`auto` takes bf16 where a GPU has it, fp32 on CPUs (where bf16 is emulated and slow)."""
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return cls(device.type, wanted == "bf16" or (wanted == "auto" and capable))


def next_tokens(rows: Tensor) -> Tensor:
    """The token to predict at every place of (rows, length); -100 at the last, which has none."""
    return functional.pad(rows[:, 1:], (0, 1), value=-100)


def summed_loss(model: Forward, rows: Tensor, precision: Precision) -> Tensor:
    """Cross-entropy of every next token, summed, in nats (fp32 scalar). rows: int64 (rows, length)."""
    with precision.context():
        logits: Tensor = model(input_ids=rows, use_cache=False).logits  # type: ignore[attr-defined]
    # Shifting the labels rather than the logits saves a copy of the largest tensor of the step.
    return functional.cross_entropy(logits.flatten(0, 1).float(), next_tokens(rows).flatten(), reduction="sum")


@torch.no_grad()
def row_losses(model: Forward, rows: Tensor, precision: Precision) -> Tensor:
    """Mean cross-entropy of each row's next tokens, nats, fp32 (rows,)."""
    with precision.context():
        logits: Tensor = model(input_ids=rows, use_cache=False).logits  # type: ignore[attr-defined]
    labels = next_tokens(rows)
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(rows.shape).sum(dim=1) / (rows.shape[1] - 1)


def predicted_tokens(rows: Tensor) -> int:
    """Tokens of (rows, length) that have a predecessor in their row."""
    return rows.shape[0] * (rows.shape[1] - 1)


def accumulate_gradient(loss_of: SummedLoss, batch: Tensor, micro_batch: int) -> Tensor:
    """Adds the gradient of the batch's mean loss to .grad, a micro-batch at a time; returns that loss (detached).

    Normalised by the token count of the whole batch, so that micro-batches of unequal size weigh as they should.
    """
    total = predicted_tokens(batch)
    loss = torch.zeros((), device=batch.device)
    for rows in batch.split(micro_batch):
        part = loss_of(rows) / total
        part.backward()
        loss += part.detach()
    return loss


@torch.no_grad()
def mean_loss(model: Forward, batches: Iterable[Tensor], precision: Precision) -> float:
    """Mean loss per predicted token over micro-batches of rows, in nats; summed in fp64."""
    total, tokens = 0.0, 0
    for rows in batches:
        total += float(summed_loss(model, rows, precision))
        tokens += predicted_tokens(rows)
    return total / tokens


def gradient_norm(weights: Iterable[nn.Parameter]) -> float:
    """Global L2 norm of the gradient."""
    return float(torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None]))


def update(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter], *, lr: float, clip: float) -> float:
    """Clips to a global L2 norm of `clip`, steps, clears the gradient; returns the norm before clipping.

    A norm that is not finite leaves weights and moments as they were.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(weights, clip if clip > 0 else float("inf")))
    if norm == norm and norm != float("inf"):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
