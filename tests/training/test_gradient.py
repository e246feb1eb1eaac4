"""Micro-batches add up to the batch; the loss is that of transformers; the learning rate is where it should be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import tiny_model
from efficientllm.config import TrainConfig
from efficientllm.training.gradient import Precision, update
from efficientllm.training.optim import build_optimizer, learning_rate
from efficientllm.training.state import start
from efficientllm.training.step import OwnBatches

CPU = Precision.choose("auto", torch.device("cpu"))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_unequal_micro_batches_add_up(micro_batch: int) -> None:
    ids = torch.arange(5 * 12).reshape(5, 12) % 61
    whole, parts = tiny_model("qwen2-gqa-tied"), tiny_model("qwen2-gqa-tied")
    want = whole(input_ids=ids, labels=ids).loss
    want.backward()
    train = TrainConfig(tokens=100, lr=1.0, micro_batch=micro_batch)
    batches: Any = SimpleNamespace(batch=lambda step: ids)
    passes = OwnBatches(start(parts, train, None), batches, train, None, CPU)
    passes.begin()
    got = passes.own()
    assert float(got) == pytest.approx(float(want.detach()), rel=1e-5)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = tiny_model("llama-gqa")
    train = TrainConfig(tokens=100, lr=1.0)
    optimizer = build_optimizer(model, train)
    before = [weight.detach().clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, torch.inf)
    update(optimizer, model.parameters(), lr=1.0, clip=1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_norms_and_biases_do_not_decay() -> None:
    optimizer = build_optimizer(tiny_model("qwen2-gqa-tied"), TrainConfig(tokens=100, lr=1.0))
    decayed, spared = optimizer.param_groups
    assert {weight.ndim for weight in decayed["params"]} == {2}
    assert {weight.ndim for weight in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)


def test_learning_rate_over_a_run() -> None:
    wsd = TrainConfig(tokens=1000, lr=1.0, warmup=0.1, decay=0.2, min_lr=0.1)
    assert learning_rate(0, wsd) == pytest.approx(1 / 101)
    assert learning_rate(100, wsd) == learning_rate(800, wsd) == 1.0
    assert learning_rate(900, wsd) == pytest.approx(0.55)
    assert learning_rate(1000, wsd) == pytest.approx(0.1)
    cosine = TrainConfig(tokens=1000, lr=1.0, warmup=0.0, schedule="cosine")
    assert learning_rate(500, cosine) == pytest.approx(0.5)
    assert learning_rate(1000, cosine) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(999, TrainConfig(tokens=1000, lr=0.3, warmup=0.0, schedule="constant")) == 0.3
