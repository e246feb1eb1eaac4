"""The chunked loss against the plain one: value, every gradient, odd shapes, memory; and when it is taken."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from conftest import tiny_config, tiny_model
from efficientllm.config import TrainConfig
from efficientllm.models.parts import recompute
from efficientllm.models.space import build
from efficientllm.planning.memory import step_memory
from efficientllm.training import gradient
from efficientllm.training.chunked_loss import chunk_tokens, is_chunked, linear_cross_entropy, token_losses
from efficientllm.training.gradient import Precision, row_losses, summed_loss

CPU, BF16 = Precision("cpu", bf16=False), Precision("cpu", bf16=True)
IDS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(2))


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float | None
) -> tuple[torch.Tensor, ...]:
    """Loss and gradients in fp64 by the plain formula."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = hidden @ weight.t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(0.37 * loss, (hidden, weight))


@pytest.mark.parametrize(("chunk", "cap"), [(1, None), (7, None), (31, None), (64, None), (7, 2.5), (64, 2.5)])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_equals_the_formula(chunk: int, cap: float | None, dtype: torch.dtype, error: float) -> None:
    """31 tokens, some without a label, the last chunk ragged. bf16: fp32 weights, as autocast has them."""
    draw = torch.Generator().manual_seed(chunk)
    hidden = torch.randn(31, 13, generator=draw).to(dtype).requires_grad_()
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    weight = torch.randn(53, 13, generator=draw).to(kept).requires_grad_()
    labels = torch.randint(0, 53, (31,), generator=draw).masked_fill(torch.arange(31) % 6 == 5, -100)
    loss = linear_cross_entropy(hidden, weight, labels, chunk, cap)
    (0.37 * loss).backward()
    want = reference(hidden, weight, labels, cap)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    for got, expected in zip((loss.detach(), hidden.grad, weight.grad), want, strict=True):
        assert got is not None
        assert float((got - expected).norm() / expected.norm()) < error
    assert hidden.grad is not None
    assert not hidden.grad[labels == -100].any()
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, chunk, cap), loss)
        assert torch.allclose(token_losses(hidden, weight, labels, chunk, cap).sum(), loss)


def test_all_labels_ignored_is_zero() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100), 3)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("precision", [CPU, BF16], ids=["fp32", "bf16"])
def test_a_model_trains_as_with_the_plain_loss(
    family: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied and untied heads of every family, with recomputed activations."""
    monkeypatch.setattr(gradient, "chunk_tokens", lambda vocabulary: 8)
    plain, chunked = tiny_model(family), tiny_model(family)
    recompute(chunked)
    chunked.train()
    wanted, got = (
        summed_loss(model, IDS, precision, chunked=model is chunked) / IDS.numel() for model in (plain, chunked)
    )
    wanted.backward()
    got.backward()
    tolerance = 4e-2 if precision.bf16 else 1e-5
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=tolerance / 10)
    for (name, one), other in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).norm() / one.grad.norm()) < tolerance, name
    rows = row_losses(plain, IDS, precision), row_losses(plain, IDS, precision, chunked=True)
    torch.testing.assert_close(*rows, rtol=tolerance / 10, atol=1e-5)


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 tokens of a vocabulary of 8,192: plain, logits, their fp32 softmax and two gradients stand together."""
    monkeypatch.setattr(gradient, "chunk_tokens", lambda vocabulary: 256)
    config = tiny_config("llama-mha-tied", vocab_size=8192, max_position_embeddings=512)
    tokens = {"tokens": 10**6, "batch_tokens": 8 * 512, "lr": 1e-3, "micro_batch": 8}
    peak = {
        loss: step_memory(config, TrainConfig.model_validate(tokens | {"loss": loss}), 512, bf16=False)
        for loss in ("plain", "chunked")
    }
    logits = 4 * 8 * 512 * 8192
    saved = peak["plain"].total - peak["chunked"].total
    assert saved > 1.8 * logits
    assert peak["chunked"].temporary + peak["chunked"].activations < 0.6 * logits


def test_auto_is_plain_on_a_cpu_and_small_vocabularies() -> None:
    assert not is_chunked("auto", "cpu", 10**6, 10**6)
    assert not is_chunked("auto", "cuda", 2**14, 2**14)
    assert is_chunked("auto", "cuda", 2**14, 2**14 + 1)
    assert is_chunked("chunked", "cpu", 1, 2)
    assert not is_chunked("plain", "cuda", 2**14, 49152)
    assert (chunk_tokens(49152), chunk_tokens(128256), chunk_tokens(2**40)) == (2048, 1024, 1)


def test_compiled_blocks_beside_it() -> None:
    """Only the decoder layers are compiled; the loss stays outside the graphs."""
    plain, compiled = build(tiny_config("llama-gqa")), build(tiny_config("llama-gqa"))
    compiled.load_state_dict(plain.state_dict())
    for block in compiled.model.layers:
        block.forward = torch.compile(block.forward, dynamic=False, backend="aot_eager")
    wanted, got = summed_loss(plain, IDS, CPU), summed_loss(compiled, IDS, CPU, chunked=True)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(compiled.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
