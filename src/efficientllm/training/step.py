"""The passes of one optimizer step over the model: its own gradient, and what pruning asks on the way.

Whoever's loop it is, every pass is made by `Passes`, and billed to the run's ledger there. Our own batches are pure
functions of their step, so that a look reads rows which training has not seen yet, and no row is skipped by that. Looks
are plain next-token loss: a teacher is never asked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from efficientllm.models.experts import balance_of, with_balance
from efficientllm.models.flops import forward_flops, training_flops
from efficientllm.models.parts import body, logits_of
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.ledger import Ledger
from efficientllm.training.capture import Inputs, Watch, captured_inputs, watched_gates
from efficientllm.training.chunked_loss import is_chunked
from efficientllm.training.distillation import Distillation, Lineage
from efficientllm.training.gradient import (
    Precision,
    SummedLoss,
    has_planes,
    micro_batches,
    model_inputs,
    predicted_by_all,
    predicted_tokens,
    summed_loss,
)
from efficientllm.training.looks import Batches, LookRows, Pass
from efficientllm.training.state import PruningPlan, TrainState

if TYPE_CHECKING:  # so that the loop runs where pydantic is not installed (benchmarks/gpu.py)
    from efficientllm.config import TrainConfig

Use = Literal["step", "gradient", "text", "inputs"]  # of a pass


class Passes(ABC):
    """Answers the engine's questions (pruning.contract.Probe) by passes over the rows of somebody's loop.

    The state's model is asked for anew in every pass: what is kept here would outlive a compaction.
    """

    hooks_are_seen = True  # by the pass of a gradient: compiled blocks do not see them

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self._kept: Inputs | None = None  # of the last gradient's pass, until they are asked for
        self._gates: GateSums | None = None  # of the step's own pass, likewise

    @abstractmethod
    def rows(self, use: Use) -> Pass:
        """The next rows for a step's own gradient, a gradient to look at, text to encode, inputs of linear layers."""

    def backward(self, use: Use, names: Sequence[str] = (), gates: GateSums | None = None) -> Tensor:
        """Adds the gradient of the rows' mean loss to .grad, a micro-batch at a time; returns that loss, detached.

        Normalised by all that is predicted, so that micro-batches of unequal size weigh as they should; with several
        processes gradient and loss are means over all of them. Keeps the inputs of the linear layers with these names.
        gates: takes in those of the rows that count; compiled blocks, which do not see the hooks, then run slowly.
        """
        state, ranks, rows = self.state, self.state.ranks, self.rows(use)
        inputs, watches = None, list[Watch]()
        loss, first = torch.zeros((), device=state.device), rows.first
        with ExitStack() as hooks:
            if names and self.hooks_are_seen:
                keeping = captured_inputs(state.model, names, rows.limit, every=rows.every, waits=True)
                inputs = hooks.enter_context(keeping)
                watches.append(inputs.taken)
            if gates is not None:
                watches.append(hooks.enter_context(watched_gates(state.model, state.space, gates)))
                hooks.enter_context(nullcontext() if self.hooks_are_seen else torch.compiler.set_stance("force_eager"))
            for place, (part, counts) in enumerate(rows.parts, start=1):
                ranks.beat()  # before the collectives: one that does not come this far is the one that others wait for
                state.runner.last(place == len(rows.parts))
                if gates is not None and has_planes(part):
                    gates.counted = predicted_tokens(part)
                with ExitStack() as counted:
                    for watch in watches if counts else ():
                        counted.enter_context(watch(first))
                    summed = state.runner.run(partial(rows.loss, part))
                mean = summed / (rows.predicted if counts else math.inf)
                mean.backward()
                loss += mean.detach()
                del summed, mean  # with them the graph, before the next forward pass
                first += len(part)
                ranks.beat()
        self._kept = inputs
        state.flops.add(rows.flops)
        state.refresh_tokens += rows.refreshed
        return ranks.over_batch(loss) / ranks.world if ranks.world > 1 else loss

    def gates(self) -> GateSums | None:
        """Those of the step's own pass, once; None where it was not watched."""
        own, self._gates = self._gates, None
        return own

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Mapping[str, Tensor]:
        """The gradient at the current weights, in .grad; the inputs on the way, (tokens, inputs) by name."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.backward("gradient", names, gates)
        kept, self._kept = self._kept, None
        if kept is not None:
            return kept
        return self.inputs(names) if names else {}

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Those that the step's own pass has met, once; else of a pass for their sake."""
        kept, self._kept = self._kept, None
        if kept is not None and kept.keys() >= set(names):
            return kept
        state, rows = self.state, self.rows("inputs")
        with captured_inputs(state.model, names, rows.limit, waits=True) as inputs:
            for part, counts in rows.parts:
                with inputs.taken(0) if counts else nullcontext():
                    state.runner.run(partial(rows.loss, part))
        state.ranks.beat()
        state.flops.add(rows.flops)
        return inputs


class Step(Passes):
    """One step of our own loop: its batch, and looks at rows to come.

    Every look reads on where the one before has stopped, from the first batch that the state does not count as done.
    batch_rows: of a whole batch, where several processes share it.
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
    ) -> None:
        super().__init__(state)
        self._batches, self._train, self._plan = batches, train, plan
        self._precision, self._distillation = precision, distillation
        self.hooks_are_seen = not train.compile
        self._balanced = balance_of(state.model.config) > 0.0
        part = () if state.ranks.world == 1 else (state.ranks.share(batch_rows),)
        self._batch = batches.batch(state.step, *part).to(state.device)
        self._shape = len(self._batch) * state.ranks.world, self._batch.shape[1]
        self.tokens = math.prod(self._shape)  # of the whole batch
        self._looks = LookRows.of(plan, *self._shape, state.ranks.world) if plan else LookRows(1, 1, 1)
        self._read = 0  # rows to come that this step's looks have read

    def own(self) -> Tensor:
        """The step's own gradient, in .grad, and its mean loss. Keeps on the way what the events after this step's
        update will want to see."""
        pruner, plan, names = self.state.pruner, self._plan, list[str]()
        if pruner and plan and not plan.at_rest and pruner.due(self.state.tokens + self.tokens):
            names = pruner.reads()
            plain = self.hooks_are_seen and self._distillation is None  # a teacher's loss is not in nats of this one
            if "gates" in pruner.looks.needs and plain:
                self._gates = GateSums(self.state.space, self.state.device)
        return self.backward("step", names, self._gates)

    def rows(self, use: Use) -> Pass:
        ranks, looks, length = self.state.ranks, self._looks, self._shape[1]
        wanted = {"step": self._shape[0], "gradient": looks.gradient, "text": looks.text}
        number = wanted.get(use, looks.correction)
        own = self._batch if use == "step" else self._next_rows(number)
        return Pass(
            list(micro_batches(own, number, self._train.micro_batch, ranks)),
            self._loss(use),
            predicted=predicted_by_all(own, number, ranks) if use in ("step", "gradient") else 1.0,
            first=ranks.share(number).start,
            every=looks.every(number) if use in ("step", "gradient") else 1,
            flops=self._flops(use, number),
            refreshed=number * length if use == "gradient" else 0,
        )

    def _next_rows(self, rows: int) -> Tensor:
        """This process's share of so many rows to come, all of one batch."""
        batch = self._shape[0]
        if self._read % batch + rows > batch:
            self._read += batch - self._read % batch
        step, first = divmod(self._read, batch)
        self._read += rows
        share = self.state.ranks.share(rows)
        part = slice(first + share.start, first + share.stop)
        return self._batches.batch(self.state.step + step, part).to(self.state.device)

    def _loss(self, use: Use) -> SummedLoss:
        """Next-token cross-entropy of rows, or of a step itself its mixture with what a teacher says (its logits in
        chunks), and with the load-balancing loss that the model asks for."""
        state, train, taught = self.state, self._train, self._distillation
        model: Any = state.model
        loss: SummedLoss
        if use == "inputs":
            return partial(_hidden_states, model, self._precision)
        if use == "step" and taught is not None:
            live = state.pruner.live if state.pruner else None
            lineage = Lineage.of(state.origin, live, state.device) if taught.hidden else None
            student = body(model), logits_of(model)
            loss = partial(taught.summed_loss, *student, precision=self._precision, lineage=lineage)
        else:
            tokens = train.micro_batch * self._shape[1]
            chunked = is_chunked(train.loss, state.device.type, tokens, model.config.vocab_size)
            loss = partial(summed_loss, model, precision=self._precision, chunked=chunked)
        return partial(with_balance, loss, model, predicted_tokens) if use == "step" and self._balanced else loss

    def _flops(self, use: Use, rows: int) -> Ledger:
        """Operations of a pass, over all processes: the student's and the teacher's."""
        length, distillation = self._shape[1], self._distillation if use == "step" else None
        forward = forward_flops(self.state.space, rows, length)
        if use == "text":
            return Ledger()  # whoever encodes it anew counts its passes
        if use == "inputs":
            assert self.state.pruner is not None
            scored = "inputs" in self.state.pruner.looks.needs
            return Ledger(looks=forward.base) if scored else Ledger(correction=forward.base)
        again, chunked = self._train.gradient_checkpointing, distillation is not None
        trained = training_flops(forward, gradient_checkpointing=again, chunked=chunked)
        if use == "gradient":
            return Ledger(looks=trained)
        return Ledger(steps=trained, teacher=distillation.teacher.flops(rows, length) if distillation else 0)


def _hidden_states(model: Any, precision: Precision, rows: Tensor) -> Tensor:
    """A pass without the LM head; a compiled block would not see the hooks that keep its inputs."""
    with precision.context(), torch.compiler.set_stance("force_eager"):
        states: Tensor = body(model)(**model_inputs(rows)).last_hidden_state
    return states
