"""Distillation from a frozen teacher as the loss of training, without vocabulary-sized tensors of two models at once.

    (1 - weight) CE(next token) + weight T^2 KL(teacher || student),   both softened by the temperature T

arXiv 1503.02531, sec. 2 (T^2 keeps the gradient's scale); forward KL on logits as in Minitron (arXiv 2407.14679).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from efficientllm.models.flops import forward_flops, teacher_flops
from efficientllm.models.parts import body, logits_of
from efficientllm.models.space import space_of
from efficientllm.training.chunked_loss import IGNORED
from efficientllm.training.gradient import Precision, model_inputs, next_tokens

Base = Callable[..., object]
Head = Callable[[Tensor], Tensor]


class Teacher(Protocol):
    def says(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What the divergence needs for each token of rows (gradient.token_ids): tensors (tokens, ...), no gradient."""
        ...

    def divergence(self, own: Tensor, temperature: float, *said: Tensor) -> Tensor:
        """KL(teacher || student) of each token (tokens,). own: the student's log-probabilities (tokens, vocabulary) at
        that temperature; said: the same tokens' part of what `says` returned."""
        ...

    def flops(self, rows: int, length: int) -> int:
        """Floating-point operations that it adds to a step on as many rows of that length."""
        ...


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that is asked anew every time. It says its last hidden states; its logits are made chunk by chunk."""

    model: PreTrainedModel

    @torch.no_grad()
    def says(self, rows: Tensor) -> tuple[Tensor, ...]:
        base = body(self.model)
        hidden: Tensor = base(**model_inputs(rows)).last_hidden_state
        return (hidden.flatten(0, 1),)

    def divergence(self, own: Tensor, temperature: float, *said: Tensor) -> Tensor:
        with torch.no_grad():
            logits = logits_of(self.model)(said[0]).float()
            wanted = functional.log_softmax(logits / temperature, dim=-1)
        return functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)

    def flops(self, rows: int, length: int) -> int:
        return teacher_flops(forward_flops(space_of(self.model.config), rows, length))


def draws(logits: Tensor, temperature: float, samples: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, fp32, and vocabulary entries, int64, of draws from softened logits: each (tokens, samples).

    Random Sampling KD (arXiv 2503.16870, sec. 4.1, drawn from the teacher itself: all weights are 1 / samples).
    Deviation: the draws of a token are systematic, at (0 .. samples - 1 + offset) / samples of its cumulated
    probabilities, with one offset (tokens,) in [0, 1). Over offsets each entry comes up samples x p times on average,
    as in independent draws, and never further from that than one.
    """
    log_p = functional.log_softmax(logits.double() / temperature, dim=-1)
    cumulated = log_p.exp().cumsum(-1)
    at = (torch.arange(samples, dtype=torch.float64, device=logits.device) + offset[:, None]) / samples
    # Below 1 although it may round to it, and of the last sum, which rounding leaves a little off 1.
    at = at.clamp(max=1.0 - 2.0**-53) * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, at, right=True)
    return log_p.gather(-1, tokens).float(), tokens


def sampled_divergence(own: Tensor, log_p: Tensor, tokens: Tensor) -> Tensor:
    """KL(teacher || student) of each token by draws from the teacher: the mean of log p - log q, whose value and whose
    gradient are both right on average. own: as in Teacher; log_p, tokens: from `draws`."""
    return (log_p - own.gather(-1, tokens.long())).mean(-1)


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher of the same vocabulary. weight of its term in [0, 1]; temperature; chunk: tokens whose logits
    stand in memory at once."""

    teacher: Teacher
    weight: float
    temperature: float
    chunk: int

    def summed_loss(self, base: Base, head: Head, rows: Tensor, precision: Precision) -> Tensor:
        """The distillation loss of every next token, summed, in nats (fp32 scalar).

        base: the student without its LM head; head: what makes its logits. rows: as of gradient.token_ids. Logits are
        computed chunk by chunk, and again in the backward pass.
        """
        with precision.context():
            said = self.teacher.says(rows)
            hidden = base(**model_inputs(rows)).last_hidden_state  # type: ignore[attr-defined]
            tokens = hidden.flatten(0, 1), next_tokens(rows).flatten(), *said
            total = torch.zeros((), device=rows.device)
            for part in zip(*(each.split(self.chunk) for each in tokens), strict=True):
                total = total + checkpoint(self._chunk_loss, head, *part, use_reentrant=False)
        return total

    def _chunk_loss(self, head: Head, hidden: Tensor, labels: Tensor, *said: Tensor) -> Tensor:
        """hidden (tokens, hidden width); labels (tokens,), -100 where there is no next token."""
        logits = head(hidden).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum") * (1.0 - self.weight)
        own = functional.log_softmax(logits / self.temperature, dim=-1)
        divergence = self.teacher.divergence(own, self.temperature, *said)
        return loss + self.weight * self.temperature**2 * divergence[labels != IGNORED].sum()
