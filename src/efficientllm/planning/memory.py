"""Memory of a training step by part, by PyTorch's own tracker on tensors that have no storage: nothing is allocated."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import PretrainedConfig

from efficientllm.config import TrainConfig
from efficientllm.models.parts import recompute
from efficientllm.models.space import build, space_of
from efficientllm.pruning.gates import GateSums
from efficientllm.training.chunked_loss import is_chunked
from efficientllm.training.gradient import Precision, summed_loss
from efficientllm.training.hooks import unwatched, watched_gates


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the worst moment of a step, the backward pass of its second micro-batch.

    activations: what the forward pass saved, logits among them; temporary: gradients of activations, largest where
    those of the logits stand. teacher: the weights of one that is asked anew every step. inputs: of linear layers, kept
    over the whole step for corrections and for scores that read them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    teacher: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        fixed = self.weights + self.gradients + self.optimizer + self.teacher + self.inputs
        return fixed + self.activations + self.temporary


def step_memory(
    config: PretrainedConfig, train: TrainConfig, length: int, *, bf16: bool, gpu: bool = False, gates: bool = False
) -> StepMemory:
    """Of the source at full shape, one micro-batch at a time; the kernels are the CPU's.

    gates: the step is watched for gate Fisher, whose inputs checkpointing does not drop. gpu: whether it is for one,
    which decides on the loss where train.loss is auto.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    precision = Precision("cpu", bf16)
    grouped = patch.object(functional, "grouped_mm", _as_of_one_expert, create=True)
    with FakeTensorMode(allow_non_fake_inputs=True), grouped:
        model = build(config)
        model.train()
        if train.gradient_checkpointing:
            recompute(model)
        tracker = MemTracker()
        tracker.track_external(model)
        rows = min(train.micro_batch, train.batch_rows(length))
        ids = torch.zeros(rows, length, dtype=torch.long)
        chunked = is_chunked(train.loss, "cuda" if gpu else "cpu", train.micro_batch * length, config.vocab_size)
        with tracker:
            sums = GateSums(space_of(config), torch.device("cpu"))
            with watched_gates(model, space_of(config), sums) if gates else nullcontext(unwatched) as watch:
                for _ in range(2):
                    with watch(0):
                        loss = summed_loss(model, ids, precision, chunked=chunked)
                    loss.backward()
                    del loss
                    tracker.reset_mod_stats()
    (parts,) = tracker.get_tracker_snapshot("peak").values()
    size = {getattr(kind, "name", str(kind)): int(value) for kind, value in parts.items()}
    weights = sum(weight.numel() * 4 for weight in model.parameters())
    other = size["Total"] - size["PARAM"] - size["GRAD"] - size["ACT"]
    return StepMemory(weights, weights, 2 * weights, size["ACT"], other)


def _as_of_one_expert(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    """In place of the product of rows (n, inputs), grouped by expert, with weights (experts, inputs, outputs), which
    refuses fp32 where tensors have no storage: shapes and memory are the same whosever the rows are."""
    del offs
    with torch.autocast(rows.device.type, enabled=False):  # which grouped products do not follow
        return rows @ weight[0]
