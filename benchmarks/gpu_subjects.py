"""What benchmarks/gpu.py measures: models in our loop, whose steps can be plain or pruning.

Built without the recipe (efficientllm.config), so that neither pydantic nor datasets is needed: Settings has the fields
of a recipe's train section that the loop reads.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from gpu_shapes import TARGET, Shape
from torch import Tensor

from efficientllm.models import parts
from efficientllm.models.space import build, space_of
from efficientllm.pruning.correction import SolverOptions
from efficientllm.pruning.dimensions import DEFAULT_TYPES
from efficientllm.pruning.engine import PrunerOptions
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.shapes import Alignment, Floors
from efficientllm.pruning.widths import Widths
from efficientllm.sizes import Position
from efficientllm.training.compaction import compact, compaction_widths
from efficientllm.training.gradient import Precision, summed_loss
from efficientllm.training.loop import StepRecord, train_steps
from efficientllm.training.state import PruningPlan, start

NOWHERE = Position(0)


@dataclass
class Settings:
    """The fields of a recipe's train section that the loop reads; `loss` may change between two steps."""

    micro_batch: int
    batch_tokens: int
    precision: str
    loss: str = "auto"
    tokens: int = 10**12
    lr: float = 1e-4
    schedule: str = "constant"
    warmup: Position = NOWHERE
    decay: Position = NOWHERE
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    compile: bool = False
    gradient_checkpointing: bool = False


@dataclass
class Pace:
    """A schedule that allows so many events, and as many more as bring the size down to `least`."""

    allowed: int = 0
    least: float = float("inf")

    def wants(self, position: float, size: float, events: int) -> bool:
        return events < self.allowed or size > self.least


@dataclass(frozen=True)
class Kind:
    """A way to take a step. pruning: none, saliency (of every unit), event (that and one event), correction (that and
    the second-order update)."""

    pruning: str = "none"
    compiled: bool = False
    loss: str = "auto"


class RandomRows:
    def __init__(self, shape: Shape) -> None:
        self._shape, self._vocabulary = shape, shape.config.vocab_size

    def batch(self, step: int, part: slice = slice(None), /) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        return torch.randint(self._vocabulary, (self._shape.rows, self._shape.length), generator=draw)[part]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Subject:
    """A model from fresh weights in our loop. Steps of all kinds train the same weights, so that they can be taken in
    turn and need the memory of one model. prunable: whether they may prune."""

    def __init__(self, shape: Shape, device: torch.device, backend: str, *, prunable: bool = True) -> None:
        torch.manual_seed(0)
        self.shape, self.device, self._backend = shape, device, backend
        model = build(shape.config, device)
        self.settings = Settings(shape.micro, shape.tokens, "bf16" if device.type == "cuda" else "fp32")
        self.pace = Pace()
        self.plan = self._plan() if prunable else None
        train: Any = self.settings
        self.state = start(model, train, self.plan)
        self._engine, self._rows = self.state.pruner, RandomRows(shape)
        self._compiled: list[Callable[..., Any]] = []

    def _plan(self) -> PruningPlan:
        """Towards the paper's share, as the pace allows; tensors are not cut to size by themselves."""
        config = self.shape.config
        space = space_of(config)
        feasible = FeasibleShapes(
            space,
            round(TARGET * int(space.num_params())),
            types=DEFAULT_TYPES,
            align=Alignment.automatic(space.widths),
            floors=Floors(hidden=space.head_dim, intermediate=32),
        )
        options = PrunerOptions(DEFAULT_TYPES, saliency="taylor-element")
        return PruningPlan(config, (feasible,), self.pace, options, compact_at=1.0)

    def _compile(self, wanted: bool) -> None:
        """Switches every block's forward, as efficientllm.distributed.layout.wrap sets it."""
        blocks = parts.blocks(self.state.model)
        if wanted and not self._compiled:
            self._compiled = [torch.compile(each.forward, dynamic=False, backend=self._backend) for each in blocks]
        for place, block in enumerate(blocks):
            block.__dict__.pop("forward", None)
            if wanted:
                block.forward = self._compiled[place]

    def step(self, kind: Kind) -> tuple[float, StepRecord]:
        """Seconds of one step of that kind, from idle device to idle device, and what it did."""
        self._compile(kind.compiled)
        engine = self._engine
        self.state.pruner = None if kind.pruning == "none" else engine
        if engine is not None:
            correction = SolverOptions() if kind.pruning == "correction" else None
            engine.options = replace(engine.options, correction=correction)
            self.pace.allowed = engine.at.events + (kind.pruning in ("event", "correction"))
        self.settings.loss = kind.loss
        synchronise(self.device)
        began = time.perf_counter()
        train: Any = self.settings
        precision = Precision.choose(train.precision, self.device)
        # A loop of its own for every step: one reads its settings when it begins.
        record = next(train_steps(self.state, self._rows, train, self.plan, steps=10**9, precision=precision))
        synchronise(self.device)
        return time.perf_counter() - began, record

    def agreement(self) -> dict[str, float]:
        """Relative difference of the chunked loss from the plain one on one micro-batch: of the loss, and of the
        embedding's gradient in the L2 norm."""
        model: Any = self.state.model
        weight = model.get_input_embeddings().weight
        rows = RandomRows(self.shape).batch(0)[: self.shape.micro].to(self.device)
        losses, gradients = [], []
        for chunked in (False, True):
            self.state.optimizer.zero_grad(set_to_none=True)
            loss = summed_loss(model, rows, Precision(self.device.type, self.device.type == "cuda"), chunked=chunked)
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(weight.grad)
        self.state.optimizer.zero_grad(set_to_none=True)
        difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
        return {"loss": abs(losses[1] / losses[0] - 1.0), "gradient": float(difference)}

    def compaction(self) -> tuple[float, Widths]:
        """Zeroes the least salient 4 % of the parameters, then: seconds that cutting them out takes, and the shape."""
        self.step(Kind("saliency"))
        engine, train, plan = self._engine, self.settings, self.plan
        assert engine is not None
        assert plan is not None
        engine.options = replace(engine.options, bound=1.0)
        self.pace.least = 0.96 * self.state.allocated_parameters
        probe: Any = SimpleNamespace(vocabulary=lambda *_: None)  # all that one bundle, not corrected, asks for
        engine.step(self.state.tokens, probe)
        widths = compaction_widths(engine.widths, engine.space.widths, plan.feasible)
        assert widths is not None
        self._compile(False)
        self._compiled = []  # of the blocks that are about to go
        torch._dynamo.reset()
        self._engine = engine = None
        gc.collect()
        synchronise(self.device)
        began = time.perf_counter()
        compact(self.state, widths, train, plan)  # type: ignore[arg-type]
        synchronise(self.device)
        seconds = time.perf_counter() - began
        self._engine = self.state.pruner
        self.pace.least = float("inf")
        return seconds, widths
