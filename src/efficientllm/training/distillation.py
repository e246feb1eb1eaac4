"""Distillation from a frozen teacher as the loss of training, without vocabulary-sized tensors of two models at once.

    (1 - weight) CE(next token) + weight T^2 KL(teacher || student),   both softened by the temperature T

arXiv 1503.02531, sec. 2 (T^2 keeps the gradient's scale); forward KL on logits as in Minitron (arXiv 2407.14679).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from efficientllm.training.gradient import Precision, next_tokens

Base = Callable[..., object]


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher of the same vocabulary. weight of its term in [0, 1]; temperature; chunk: tokens whose logits
    stand in memory at once."""

    teacher: PreTrainedModel
    weight: float
    temperature: float
    chunk: int

    def summed_loss(self, base: Base, head: nn.Module, rows: Tensor, precision: Precision) -> Tensor:
        """The distillation loss of every next token, summed, in nats (fp32 scalar).

        base: the student without its LM head. rows: int64 (rows, length). Logits are computed chunk by chunk, and
        again in the backward pass.
        """
        teacher: PreTrainedModel = self.teacher
        with precision.context():
            with torch.no_grad():
                taught = teacher.model(input_ids=rows, use_cache=False).last_hidden_state
            hidden = base(input_ids=rows, use_cache=False).last_hidden_state  # type: ignore[attr-defined]
            tokens = hidden.flatten(0, 1), taught.flatten(0, 1), next_tokens(rows).flatten()
            total = torch.zeros((), device=rows.device)
            for part in zip(*(each.split(self.chunk) for each in tokens), strict=True):
                total = total + checkpoint(self._chunk_loss, head, *part, use_reentrant=False)
        return total

    def _chunk_loss(self, head: nn.Module, hidden: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """hidden, taught (tokens, hidden width of each); labels (tokens,), -100 where there is no next token."""
        logits = head(hidden).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum") * (1.0 - self.weight)
        if not self.weight:
            return loss
        with torch.no_grad():
            wanted = functional.log_softmax(self.teacher.lm_head(taught).float() / self.temperature, dim=-1)
        own = functional.log_softmax(logits / self.temperature, dim=-1)
        divergence = functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)
        return loss + self.weight * self.temperature**2 * divergence[labels != -100].sum()
