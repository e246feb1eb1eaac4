"""One batch: its loss, its gradient, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from efficientllm.distributed.layout import Runner
from efficientllm.distributed.ranks import ALONE, World
from efficientllm.models.parts import body, logits_of
from efficientllm.pruning.shards import local
from efficientllm.training.chunked_loss import IGNORED, chunk_tokens, linear_cross_entropy, token_losses

Forward = Callable[..., object]
SummedLoss = Callable[[Tensor], Tensor]  # of rows, over every next token


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


def has_planes(rows: Tensor) -> bool:
    """Whether rows say more than their tokens; without, each token but a row's first is predicted."""
    return rows.dim() == 3


def token_ids(rows: Tensor) -> Tensor:
    """The tokens (rows, length) of rows, which may have planes beside them: int64 (rows, length, 2) with the label at
    each place, (rows, length, 3) with each token's position in its document too (data/planes.py)."""
    return rows[..., 0] if has_planes(rows) else rows


def model_inputs(rows: Tensor) -> dict[str, Any]:
    """What a model or its body is called with. Positions that restart within a row say to transformers, which makes
    the masks, that it is packed: attention then stays within a document."""
    inputs: dict[str, Any] = {"input_ids": token_ids(rows), "use_cache": False}
    return inputs | {"position_ids": rows[..., 2]} if has_planes(rows) and rows.shape[2] == 3 else inputs


def next_tokens(rows: Tensor) -> Tensor:
    """The token to predict at every place of (rows, length); -100 where there is none, as at the last."""
    return rows[..., 1] if has_planes(rows) else functional.pad(rows[:, 1:], (0, 1), value=IGNORED)


def summed_loss(model: Forward, rows: Tensor, precision: Precision, *, chunked: bool = False) -> Tensor:
    """Cross-entropy of every next token, summed, in nats (fp32 scalar). rows: as of token_ids.

    chunked: without all logits in memory at once (training/chunked_loss.py).
    """
    if chunked:
        hidden, weight, cap = _before_head(model, rows, precision)
        return linear_cross_entropy(hidden, weight, next_tokens(rows).flatten(), chunk_tokens(len(weight)), cap)
    with precision.context():
        logits: Tensor = model(**model_inputs(rows)).logits  # type: ignore[attr-defined]
    # Shifting the labels rather than the logits saves a copy of the largest tensor of the step.
    return functional.cross_entropy(logits.flatten(0, 1).float(), next_tokens(rows).flatten(), reduction="sum")


def _before_head(model: Any, rows: Tensor, precision: Precision) -> tuple[Tensor, Tensor, float | None]:
    """Last hidden states (tokens, width), in the dtype of computation, divided as the logits are; the LM head's weight;
    the cap on the logits."""
    with precision.context():
        hidden: Tensor = body(model)(**model_inputs(rows)).last_hidden_state.flatten(0, 1)
    hidden, rule = hidden.to(torch.bfloat16) if precision.bf16 else hidden, logits_of(model)
    hidden = hidden if rule.divisor == 1.0 else hidden / rule.divisor
    return hidden, model.get_output_embeddings().weight, rule.cap


@torch.no_grad()
def row_losses(model: Forward, rows: Tensor, precision: Precision, *, chunked: bool = False) -> Tensor:
    """Mean cross-entropy of each row's next tokens, nats, fp32 (rows,); 0 of a row that has none to predict. chunked:
    as for summed_loss."""
    labels = next_tokens(rows).flatten()
    if chunked:
        hidden, weight, cap = _before_head(model, rows, precision)
        losses = token_losses(hidden, weight, labels, chunk_tokens(len(weight)), cap)
    else:
        with precision.context():
            logits: Tensor = model(**model_inputs(rows)).logits  # type: ignore[attr-defined]
        losses = functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none")
    sums = losses.view(rows.shape[:2]).sum(dim=1)
    if not has_planes(rows):
        return sums / (rows.shape[1] - 1)
    return sums / (next_tokens(rows) != IGNORED).sum(dim=1).clamp(min=1)


def predicted_tokens(rows: Tensor) -> int:
    """Tokens that are predicted: without labels all that have a predecessor in their row."""
    return int((rows[..., 1] != IGNORED).sum()) if has_planes(rows) else rows.shape[0] * (rows.shape[1] - 1)


def predicted_by_all(own: Tensor, number: int, ranks: World) -> float:
    """What is predicted in so many rows of all processes together. own: this process's rows of them."""
    if not has_planes(own):  # all alike
        return number * (own.shape[1] - 1)
    predicted = float(predicted_tokens(own))
    if ranks.world > 1:
        predicted = float(ranks.over_batch(torch.tensor([predicted], dtype=torch.float64)))
    return max(1.0, predicted)


@torch.no_grad()
def mean_loss(
    loss_of: SummedLoss, batches: Iterable[tuple[Tensor, bool]], runner: Runner = ALONE, ranks: World = ALONE
) -> float:
    """Mean loss per predicted token over the micro-batches of all processes, in nats; summed in fp64.
    Those marked False are passed through the model only so that every process makes as many passes, and do not count.
    """
    total, tokens = 0.0, 0
    for rows, counts in batches:
        loss = float(runner.run(partial(loss_of, rows)))
        total += loss if counts else 0.0
        tokens += predicted_tokens(rows) if counts else 0
        ranks.beat()
    if ranks.world > 1:
        total, tokens = ranks.over_batch(torch.tensor([total, tokens], dtype=torch.float64)).tolist()
    return total / max(1, tokens)


def micro_batches(own: Tensor, rows: int, micro_batch: int, ranks: World) -> Iterator[tuple[Tensor, bool]]:
    """This process's rows of so many in micro-batches, filled up to the number of passes that every process makes."""
    parts = own.split(micro_batch) if len(own) else ()
    yield from ((part, True) for part in parts)
    yield from ((own[:1], False) for _ in range(ranks.rounds(rows, micro_batch) - len(parts)))


def gradient_norm(weights: Iterable[nn.Parameter], ranks: World = ALONE) -> float:
    """Global L2 norm of the gradient, over all shards. Copies of sharded weights get the same bits of it: summed within
    each group of shards alone, they could differ in the last one, and drift apart by clipping."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if 1 < ranks.shards < ranks.world:
        own = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])
        return math.sqrt(float(ranks.over_shards(own.double().square())))
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def update(
    optimizer: torch.optim.Optimizer,
    weights: Iterable[nn.Parameter],
    *,
    lr: float,
    clip: float,
    norm: float | None = None,
) -> float:
    """Clips to a global L2 norm of `clip`, steps, clears the gradient; returns the norm before clipping.

    norm: of the gradient, where it is known already. One that is not finite leaves weights and moments as they were.
    """
    weights = list(weights)
    norm = gradient_norm(weights) if norm is None else norm
    if math.isfinite(norm):
        if clip > 0:
            total = torch.tensor(norm, device=weights[0].device)
            torch.nn.utils.clip_grads_with_norm_(weights, clip, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
