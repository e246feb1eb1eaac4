"""The passes of our own loop: a step's own gradient, and what pruning asks beside it.

Our batches are pure functions of their step, so that a look reads rows which training has not seen yet, and no row is
skipped by that. Looks are plain next-token loss: a teacher is never asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from efficientllm.models.experts import balance_of, with_balance
from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.parts import body, logits_of
from efficientllm.pruning.decision import ByDamage, Standing
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.ledger import Ledger
from efficientllm.training.chunked_loss import is_chunked
from efficientllm.training.distillation import Distillation, Lineage
from efficientllm.training.gradient import (
    Precision,
    SummedLoss,
    micro_batches,
    model_inputs,
    predicted_by_all,
    predicted_tokens,
    summed_loss,
)
from efficientllm.training.hooks import Inputs, captured_inputs
from efficientllm.training.passes import Pass, Passes, Use, kept_every, passes_over, rows_by_use
from efficientllm.training.state import PruningPlan, TrainState

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig
    from efficientllm.training.vocabulary import Vocabulary


class Batches(Protocol):
    def batch(self, step: int, part: slice = slice(None), /) -> Tensor:
        """The batch of a step, or some of its rows, as of gradient.token_ids: a pure function of (seed, step)."""
        ...


class OwnBatches(Passes):
    """The passes of our own loop: over the batch of each step, and over rows to come.

    Every look reads on where the one before has stopped, from the first batch that the state does not count as done.
    batch_rows: of a whole batch, where several processes share it. steps: of the whole run. vocabulary: where tokens
    may fall.
    """

    def __init__(
        self,
        state: TrainState,
        batches: Batches,
        train: TrainConfig,
        plan: PruningPlan | None,
        precision: Precision,
        distillation: Distillation | None = None,
        batch_rows: int = 0,
        steps: int = 0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__(state)
        self._batches, self._train, self._plan = batches, train, plan
        self._precision, self._distillation = precision, distillation
        self._batch_rows, self._steps, self._vocabulary = batch_rows, steps, vocabulary
        self.hooks_are_seen = not train.compile
        self._balanced = balance_of(state.model.config) > 0.0
        self._rows: dict[Use, int] = {}  # of a pass, as of rows_by_use
        self._read = 0  # rows to come that this step's looks have read

    def begin(self) -> None:
        """Goes on to the batch of the state's step."""
        state, world = self.state, self.state.ranks.world
        part = () if world == 1 else (state.ranks.share(self._batch_rows),)
        self._batch = self._batches.batch(state.step, *part).to(self.device)
        self._read, self._kept, self._gates = 0, None, None
        if not self._rows:  # what follows from the shape of a batch, the same in every step
            rows, self._length = len(self._batch) * world, self._batch.shape[1]
            self.tokens = rows * self._length  # of a whole batch
            self._rows = rows_by_use(self._plan, rows, self._length, world)
            tokens, vocabulary = self._train.micro_batch * self._length, state.model.config.vocab_size
            self._chunked = is_chunked(self._train.loss, self.device.type, tokens, vocabulary)

    def own(self) -> Tensor:
        """The step's own gradient, in .grad, and its mean loss. Keeps on the way what the events after this step's
        update will want to see."""
        pruner, plan, names = self.state.pruner, self._plan, list[str]()
        if pruner and plan and not plan.at_rest and pruner.due(self.state.tokens + self.tokens):
            names = pruner.reads()
            # The loss of a teacher, or with that of an even load, is not in nats of the model's own.
            plain = self.hooks_are_seen and self._distillation is None and not self._balanced
            if "gates" in pruner.looks.needs and plain:
                self._gates = GateSums(self.state.space, self.device)
        loss, self._kept = self.backward("step", names, self._gates)
        return loss

    def rows(self, use: Use) -> Pass:
        ranks, number = self.state.ranks, self._rows[use]
        own = self._batch if use == "step" else self._next_rows(number)
        self._bill(use, number)
        return Pass(
            list(micro_batches(own, number, self._train.micro_batch, ranks)),
            self._loss(use),
            predicted=predicted_by_all(own, number, ranks) if use in ("step", "gradient") else 1,
            first=ranks.share(number).start,
        )

    def passes(self, use: Use, batches: int) -> int:
        return passes_over(self._rows, use, batches)

    def keeping(self, use: Use, names: Sequence[str]) -> AbstractContextManager[Inputs]:
        every = kept_every(self._rows[use], self._rows["inputs"])
        return captured_inputs(self.state.model, names, every=every, waits=True)

    def vocabulary(self, guide: ByDamage, at: Standing) -> int | None:
        """As of Probe. Not where the steps that are left are as many as the milestones, each of which takes one."""
        if self._vocabulary is None or self._plan is None:
            return None
        left = self._steps - self.state.step - self._plan.at_rest  # without this one
        spared = left >= len(self._plan.milestones) - at.milestone
        return self._vocabulary.choose(self.state, self, guide, at) if spared else None

    def _next_rows(self, rows: int) -> Tensor:
        """This process's share of so many rows to come, all of one batch."""
        batch = self._rows["step"]
        if self._read % batch + rows > batch:
            self._read += batch - self._read % batch
        step, first = divmod(self._read, batch)
        self._read += rows
        share = self.state.ranks.share(rows)
        part = slice(first + share.start, first + share.stop)
        return self._batches.batch(self.state.step + step, part).to(self.device)

    def _loss(self, use: Use) -> SummedLoss:
        """Next-token cross-entropy of rows, or of a step itself its mixture with what a teacher says (its logits in
        chunks), and with the load-balancing loss that the model asks for."""
        state, taught = self.state, self._distillation
        model: Any = state.model
        loss: SummedLoss
        if use == "inputs":
            return partial(_hidden_states, model, self._precision)
        if use == "step" and taught is not None:
            live = state.pruner.live if state.pruner else None
            lineage = Lineage.of(state.origin, live, self.device) if taught.hidden else None
            student = body(model), logits_of(model)
            loss = partial(taught.summed_loss, *student, precision=self._precision, lineage=lineage)
        else:
            loss = partial(summed_loss, model, precision=self._precision, chunked=self._chunked)
        return partial(with_balance, loss, model, predicted_tokens) if use == "step" and self._balanced else loss

    def _bill(self, use: Use, rows: int) -> None:
        """Counts the operations of a pass, over all processes: the student's and the teacher's. Whoever encodes text
        anew counts its passes."""
        state, flops, length = self.state, self.state.flops, self._length
        if use == "text":
            return
        forward = forward_flops(state.space, rows, length)
        if use == "inputs":
            assert state.pruner is not None
            for_scores = "inputs" in state.pruner.looks.needs
            flops.add(Ledger(looks=forward.base) if for_scores else Ledger(correction=forward.base))
            return
        taught = self._distillation if use == "step" else None
        again = self._train.gradient_checkpointing
        trained = training_flops(forward, gradient_checkpointing=again, chunked=taught is not None)
        if use == "gradient":
            flops.looks += trained
            state.refresh_tokens += rows * length
        else:
            flops.add(Ledger(trained, teacher=taught.teacher.flops(rows, length) if taught else 0))


def _hidden_states(model: Any, precision: Precision, rows: Tensor) -> Tensor:
    """A pass without the LM head; a compiled block would not see the hooks that keep its inputs."""
    with precision.context(), torch.compiler.set_stance("force_eager"):
        states: Tensor = body(model)(**model_inputs(rows)).last_hidden_state
    return states
