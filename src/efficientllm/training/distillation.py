"""Distillation from a frozen teacher as the loss of training, without vocabulary-sized tensors of two models at once.

    (1 - weight) CE(next token) + weight KL(teacher || student) + hidden D(teacher, student)

arXiv 1503.02531, sec. 2, at a temperature of 1; forward KL on logits as in Minitron (arXiv 2407.14679). D is how far
the student's residual stream is from the teacher's (`stream_distance`). Minitron learns a projection of one onto the
other; a student whose units are a subset of its teacher's is compared with it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from efficientllm.models.flops import forward_flops, teacher_flops
from efficientllm.models.parts import body, logits_of
from efficientllm.models.space import space_of
from efficientllm.pruning.dimensions import HIDDEN, LAYERS
from efficientllm.pruning.live import Live
from efficientllm.training.chunked_loss import IGNORED
from efficientllm.training.gradient import Precision, model_inputs, next_tokens

Base = Callable[..., object]
Head = Callable[[Tensor], Tensor]
EPSILON = 1e-6  # beside the mean square of a token's residual stream, as in the norms that read it


class Teacher(Protocol):
    def says(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What the divergence needs for each token of rows (gradient.token_ids): tensors (tokens, ...), no gradient."""
        ...

    def divergence(self, own: Tensor, *said: Tensor) -> Tensor:
        """KL(teacher || student) of each token (tokens,). own: the student's log-probabilities (tokens, vocabulary);
        said: the same tokens' part of what `says` returned."""
        ...

    def flops(self, rows: int, length: int) -> int:
        """Floating-point operations that it adds to a step on as many rows of that length."""
        ...


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that is asked anew every time. It says its last hidden states; its logits are made chunk by chunk.
    streams: it says its residual stream too, before its first layer and after each but the last."""

    model: PreTrainedModel
    streams: bool = False

    @torch.no_grad()
    def says(self, rows: Tensor) -> tuple[Tensor, ...]:
        out: Any = body(self.model)(**model_inputs(rows), output_hidden_states=self.streams)
        return tuple(each.flatten(0, 1) for each in (out.last_hidden_state, *(out.hidden_states or ())[:-1]))

    def divergence(self, own: Tensor, *said: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(logits_of(self.model)(said[0]).float(), dim=-1)
        return functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)

    def flops(self, rows: int, length: int) -> int:
        return teacher_flops(forward_flops(space_of(self.model.config), rows, length))


def draws(logits: Tensor, samples: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, fp32, and vocabulary entries, int64, of draws by logits: each (tokens, samples).

    Random Sampling KD (arXiv 2503.16870, sec. 4.1, drawn from the teacher itself: all weights are 1 / samples).
    Deviation: the draws of a token are systematic, at (0 .. samples - 1 + offset) / samples of its cumulated
    probabilities, with one offset (tokens,) in [0, 1). Over offsets each entry comes up samples x p times on average,
    as in independent draws, and never further from that than one.
    """
    log_p = functional.log_softmax(logits.double(), dim=-1)
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
class Lineage:
    """Which of a student's layers (all live ones but the last) and residual channels (all live ones) are which of its
    teacher's: places in both, of channels int64 (channels,)."""

    layers: Sequence[tuple[int, int]]
    own: Tensor
    theirs: Tensor

    @classmethod
    def of(cls, origin: Mapping[str, Tensor], live: Live | None, device: torch.device) -> Lineage:
        """origin: by dimension which of the source's units the student has, bool (units of the source,), the teacher's
        being the same; live: which of the student's count, None for all."""
        own, theirs = {}, {}
        for name in (LAYERS, HIDDEN):
            places = origin[name].nonzero().flatten()
            own[name] = live[name].nonzero().flatten() if live else torch.arange(len(places))
            theirs[name] = places[own[name]]
        layers = list(zip(own[LAYERS].tolist(), theirs[LAYERS].tolist(), strict=True))[:-1]
        return cls(layers, own[HIDDEN].to(device), theirs[HIDDEN].to(device))


def stream_distance(own: Sequence[Tensor], theirs: Sequence[Tensor], lineage: Lineage, counted: Tensor) -> Tensor:
    """The mean over layers of |s - t|^2 / |t|^2, summed over the tokens that count (bool (tokens,)); fp32 scalar.

    s and t are the residual stream of student and teacher after a layer, at the channels that the student has left.
    own, theirs: (tokens, width) before the first layer and after each. Each token is measured by its own |t|^2: those
    that attention gathers on, whose stream is a thousand times the others' (arXiv 2402.17762), would else outweigh all.
    """
    total = torch.zeros((), device=counted.device)
    for mine, source in lineage.layers:
        part = own[mine + 1], theirs[source + 1], lineage, counted
        total = total + checkpoint(_layer_distance, *part, use_reentrant=False)
    return total / max(1, len(lineage.layers))


def _layer_distance(own: Tensor, theirs: Tensor, lineage: Lineage, counted: Tensor) -> Tensor:
    s, t = own[:, lineage.own].float(), theirs[:, lineage.theirs].float()
    apart = (s - t).square().mean(-1) / (t.square().mean(-1) + EPSILON)
    return apart[counted].sum()


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher of the same vocabulary. weight of its term in [0, 1]; chunk: tokens whose logits stand in memory
    at once; hidden: weight of the distance between residual streams, which wants a LiveTeacher that streams."""

    teacher: Teacher
    weight: float
    chunk: int
    hidden: float = 0.0

    def summed_loss(
        self, base: Base, head: Head, rows: Tensor, precision: Precision, lineage: Lineage | None = None
    ) -> Tensor:
        """The distillation loss of every next token, summed, in nats (fp32 scalar).

        base: the student without its LM head; head: what makes its logits. rows: as of gradient.token_ids. Logits are
        computed chunk by chunk, and again in the backward pass. lineage: for the distance between residual streams.
        """
        with precision.context():
            last, *said = self.teacher.says(rows)
            streams: dict[str, Any] = {"output_hidden_states": True} if self.hidden else {}
            out: Any = base(**model_inputs(rows), **streams)
            labels = next_tokens(rows).flatten()
            total = torch.zeros((), device=rows.device)
            if self.hidden:
                assert lineage is not None
                own = [each.flatten(0, 1) for each in out.hidden_states]
                total = total + self.hidden * stream_distance(own, said, lineage, labels != IGNORED)
                said = []
            tokens = out.last_hidden_state.flatten(0, 1), labels, last, *said
            for part in zip(*(each.split(self.chunk) for each in tokens), strict=True):
                total = total + checkpoint(self._chunk_loss, head, *part, use_reentrant=False)
        return total

    def _chunk_loss(self, head: Head, hidden: Tensor, labels: Tensor, *said: Tensor) -> Tensor:
        """hidden (tokens, hidden width); labels (tokens,), -100 where there is no next token."""
        logits = head(hidden).float()
        loss = functional.cross_entropy(logits, labels, reduction="sum") * (1.0 - self.weight)
        divergence = self.teacher.divergence(functional.log_softmax(logits, dim=-1), *said)
        return loss + self.weight * divergence[labels != IGNORED].sum()
