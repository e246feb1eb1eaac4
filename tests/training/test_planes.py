"""Rows with labels and with positions: loss, gradient, gates and teachers count what is predicted alone, and documents
that share a row are as they would be each by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from conftest import tiny_model
from efficientllm.config import TrainConfig
from efficientllm.data.planes import NO_LABEL, Planes, with_planes
from efficientllm.data.rows import BEGINS, CONTEXT
from efficientllm.evaluation.removal import loss_increases
from efficientllm.evaluation.validation import validation_loss
from efficientllm.models.space import space_of
from efficientllm.pruning.gates import GateSums
from efficientllm.training.chunked_loss import IGNORED
from efficientllm.training.distillation import Distillation, LiveTeacher
from efficientllm.training.gradient import Precision, model_inputs, predicted_tokens, row_losses, summed_loss
from efficientllm.training.hooks import watched_gates
from efficientllm.training.state import start
from efficientllm.training.step import OwnBatches
from efficientllm.training.teacher_cache import CachedTeacher

CPU = Precision("cpu", bf16=False)
GENERATOR = torch.Generator().manual_seed(5)
IDS = torch.randint(1, 61, (5, 20), generator=GENERATOR)
LABELLED = torch.stack([IDS, torch.where(torch.rand(5, 20, generator=GENERATOR) < 0.4, IDS.roll(-1, 1), -100)], -1)
LABELLED[:, -1, 1] = -100
LABELLED[3, :, 1] = -100  # a row with nothing to predict
assert NO_LABEL == IGNORED  # of two rooms neither of which knows the other
END, LENGTHS = 0, [[20], [7, 13], [1, 1, 9, 9], [2, 18], [12, 8]]  # of the documents of each row


def packed() -> Tensor:
    """Documents of LENGTHS, each but the last of a row with an EOS; with positions."""
    ids = IDS.clone()
    for row, lengths in enumerate(LENGTHS):
        ids[row, np.cumsum(lengths)[:-1] - 1] = END
    return torch.from_numpy(with_planes(ids.numpy(), None, Planes.POSITIONS, END))


def documents(rows: Tensor) -> list[Tensor]:
    """Each document of packed rows as a row of its own, (1, length)."""
    return [part[None, :, 0] for row, lengths in zip(rows, LENGTHS, strict=True) for part in row.split(lengths)]


def test_planes_say_what_stands_in_a_row() -> None:
    ids = np.asarray([[5, 6, 0, 7, 0, 8]])
    marks = np.asarray([[CONTEXT | BEGINS, 0, 0, CONTEXT, BEGINS, 0]], dtype=np.uint8)
    assert with_planes(ids, None, Planes.TOKENS, 0) is ids
    labels = with_planes(ids, None, Planes.LABELS, 0)
    assert labels[..., 1].tolist() == [[6, 0, 7, 0, 8, -100]]
    assert with_planes(ids, marks, Planes.LABELS, 0)[..., 1].tolist() == [[6, 0, -100, 0, 8, -100]]
    full = with_planes(ids, None, Planes.POSITIONS, 0)
    assert full[..., 1].tolist() == [[6, 0, -100, 0, -100, -100]]
    assert full[..., 2].tolist() == [[0, 1, 2, 0, 1, 0]]
    marked = with_planes(ids, marks, Planes.POSITIONS, 0)
    assert marked[..., 1].tolist() == [[6, 0, -100, -100, 8, -100]]
    assert marked[..., 2].tolist() == [[0, 1, 2, 3, 0, 1]]


@pytest.mark.parametrize("chunked", [False, True])
def test_only_labels_are_predicted(chunked: bool) -> None:
    model = tiny_model("llama-gqa")
    logits = model(input_ids=IDS).logits.double()
    each = functional.cross_entropy(logits.transpose(1, 2), LABELLED[..., 1], reduction="none")
    torch.testing.assert_close(
        summed_loss(model, LABELLED, CPU, chunked=chunked).double(), each.sum(), rtol=1e-5, atol=0
    )
    counts = (LABELLED[..., 1] != -100).sum(1)
    assert predicted_tokens(LABELLED) == int(counts.sum())
    expected = each.sum(1) / counts.clamp(min=1)
    torch.testing.assert_close(row_losses(model, LABELLED, CPU, chunked=chunked).double(), expected, rtol=1e-5, atol=0)
    plain = torch.from_numpy(with_planes(IDS.numpy(), None, Planes.LABELS, END))
    assert torch.equal(summed_loss(model, plain, CPU), summed_loss(model, IDS, CPU))
    assert predicted_tokens(plain) == predicted_tokens(IDS)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_a_step_is_the_mean_over_all_labels(micro_batch: int) -> None:
    whole, parts = tiny_model("qwen2-gqa-tied"), tiny_model("qwen2-gqa-tied")
    logits = whole(input_ids=IDS).logits
    want = functional.cross_entropy(logits.flatten(0, 1), LABELLED[..., 1].flatten())
    want.backward()
    train = TrainConfig(tokens=100, lr=1.0, micro_batch=micro_batch)
    batches: Any = SimpleNamespace(batch=lambda step: LABELLED)
    passes = OwnBatches(start(parts, train, None), batches, train, None, CPU)
    passes.begin()
    got = passes.own()
    assert float(got) == pytest.approx(float(want.detach()), rel=1e-5)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_validation_is_the_mean_over_all_labels() -> None:
    model = tiny_model("llama-gqa")

    class Held:
        def __len__(self) -> int:
            return 5

        def take(self, indices: Any) -> Tensor:
            return LABELLED[list(indices)]

    logits = model(input_ids=IDS).logits
    want = functional.cross_entropy(logits.flatten(0, 1), LABELLED[..., 1].flatten())
    got = validation_loss(model, [Held()], micro_batch=2, limit=None, device="cpu", precision=CPU)
    assert got == pytest.approx(float(want.detach()), rel=1e-5)


def test_gates_count_labels() -> None:
    """Rows of which only a beginning is predicted score as these beginnings do: what follows has no gradient."""
    model, labelled = tiny_model("llama-gqa"), torch.stack([IDS, IDS.roll(-1, 1)], -1)
    labelled[:, 9:, 1] = -100
    found = []
    for rows in (IDS[:, :10], labelled):
        gates = GateSums(space_of(model.config), torch.device("cpu"))
        with watched_gates(model, space_of(model.config), gates) as watch:
            for part in rows.split(2):
                gates.counted = predicted_tokens(part)
                with watch(0):
                    loss = summed_loss(model, part, CPU) / predicted_tokens(rows)
                loss.backward()
        found.append(gates.scores())
    for name, scores in found[0].items():
        torch.testing.assert_close(scores, found[1][name], rtol=1e-4, atol=1e-9)


def test_documents_of_a_row_are_as_by_themselves(family: str) -> None:
    """In fp64; mixtures of experts, whose kernel takes none, in fp32."""
    model, rows = tiny_model(family).eval(), packed()
    experts = hasattr(model.config, "num_experts")
    model = model if experts else model.double()
    alone = [model(input_ids=each).logits[0] for each in documents(rows)]
    together = model(**model_inputs(rows)).logits.flatten(0, 1)
    capped = getattr(model.config, "attn_logit_softcapping", None)  # attention then takes its softmax in fp32
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5 if capped or experts else 1e-9)
    crossing = model(**model_inputs(rows[..., 0])).logits.flatten(0, 1)
    assert (crossing - together).abs().max() > 0.1
    losses = sum(summed_loss(model, each, CPU) for each in documents(rows) if each.shape[1] > 1)
    for chunked in (False, True):
        torch.testing.assert_close(summed_loss(model, rows, CPU, chunked=chunked).float(), losses, rtol=1e-5, atol=0)
    assert predicted_tokens(rows) == sum(each.shape[1] - 1 for each in documents(rows))


def test_a_teacher_and_removals_stay_within_documents(tmp_path: Path) -> None:
    student, model, rows = tiny_model("llama-gqa"), tiny_model("qwen3-gqa", seed=4).eval(), packed()
    draws: dict[str, Any] = {"length": 20, "samples": 7, "space": space_of(model.config)}
    teachers = {
        "live": LiveTeacher(model),
        "kept": CachedTeacher(tmp_path, lambda: model, **draws),
    }
    said = teachers["live"].says(rows)[0]
    hidden = [model.model(input_ids=each).last_hidden_state[0] for each in documents(rows)]
    torch.testing.assert_close(said, torch.cat(hidden), rtol=0, atol=1e-5)
    log_p, tokens = teachers["kept"].says(rows)
    own = functional.log_softmax(model.lm_head(torch.cat(hidden)), -1)
    torch.testing.assert_close(log_p, own.gather(-1, tokens), rtol=0, atol=1e-2)  # kept in fp16
    live = Distillation(teachers["live"], 0.6, 8)
    together = live.summed_loss(student.model, student.lm_head, rows, CPU)
    alone = [live.summed_loss(student.model, student.lm_head, each, CPU) for each in documents(rows)]
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=0)
    unit = ("ffn", 1, 3)
    lost = copy.deepcopy(student)
    with torch.no_grad():
        for name, part in (("gate_proj", 3), ("up_proj", 3)):
            getattr(lost.model.layers[1].mlp, name).weight[part] = 0.0
    (sample,) = loss_increases(student, [unit], rows, 2, CPU, lambda _: None)
    want = (summed_loss(lost, rows, CPU) - summed_loss(student, rows, CPU)) / predicted_tokens(rows)
    assert sample.increase == pytest.approx(float(want), abs=1e-5)
