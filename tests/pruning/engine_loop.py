"""The engine in a bare training loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from conftest import tiny_model
from efficientllm.models.space import space_of
from efficientllm.pruning.correction import SolverOptions
from efficientllm.pruning.decision import ByDamage, Standing
from efficientllm.pruning.dimensions import of_type
from efficientllm.pruning.engine import PrunerOptions, PruningEngine
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.schedule import SpanSchedule
from efficientllm.pruning.shapes import Alignment, Floors
from efficientllm.training.hooks import Inputs, captured_inputs, watched_gates

MIXED = {"stem": "gate-fisher", "ffn": "flap", "attention": "wanda", "attention_query": "taylor-element"}


class Loop:
    """A bare training loop around a tiny model; also the pruner's probe. Corrected by default."""

    def __init__(self, family: str, *, share: float = 0.4, span: float = 10.0, **options: object) -> None:
        shape = {"num_hidden_layers": options.pop("num_hidden_layers", 2)} | options.pop("config", {})
        self.model = tiny_model(family, **shape)
        self.params = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.space = space_of(self.model.config)
        target = int(self.space.num_params() * share)
        types = tuple(options.pop("types", [each for each in self.space.types if of_type(each).default]))
        options = {"correction": SolverOptions(), "saliency": "taylor-element"} | options
        floors = Floors(**({"hidden": 8, "intermediate": 8} | options.pop("floors", {})))  # type: ignore[operator]
        feasible = FeasibleShapes(self.space, target, types=types, align=Alignment(4, 4), floors=floors)
        self.pruner = PruningEngine(
            self.space,
            self.params,
            self.moments,
            milestones=[feasible],
            schedule=SpanSchedule(0.0, span, self.space.num_params(), target, "linear"),
            options=PrunerOptions(types, **options),  # type: ignore[arg-type]
        )
        self.generator = torch.Generator().manual_seed(7)
        self.refreshes = 0

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        state = self.optimizer.state.get(self.params[name], {})
        return {key: value for key, value in state.items() if value.ndim}

    def loss(self) -> float:
        return float(self.model(input_ids=self.ids, labels=self.ids).loss.detach())

    def passes(self, use: str, batches: int) -> int:
        return max(1, batches)

    def gates(self) -> None:
        return None

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Inputs:
        self.optimizer.zero_grad()
        watching = (
            watched_gates(self.model, self.pruner.space, gates) if gates else nullcontext(lambda row: nullcontext())
        )
        with captured_inputs(self.model, names) as inputs, watching as watch:
            with watch(0):
                loss = self.model(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
        self.refreshes += 1
        return inputs

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Inputs:
        with captured_inputs(self.model, names) as inputs:
            self.model(input_ids=self.ids)
        return inputs

    def vocabulary(self, guide: ByDamage, at: Standing) -> None:
        return None

    def train_step(self, position: float, observe: bool = True) -> object:
        self.ids = torch.randint(0, 61, (4, 12), generator=self.generator)
        self.optimizer.zero_grad()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        if observe:
            self.pruner.observe()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return self.pruner.step(position, self)
