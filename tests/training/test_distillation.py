"""The chunked distillation loss against the plain formula in fp64, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from conftest import tiny_model
from efficientllm.training.distillation import Distillation
from efficientllm.training.gradient import Precision, summed_loss

CPU = Precision("cpu", bf16=False)
IDS = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 2.5)])
def test_equals_the_formula(chunk: int, weight: float, temperature: float) -> None:
    student, teacher = tiny_model("llama-mha-tied"), tiny_model("qwen2-gqa-tied", seed=4).eval()
    distillation = Distillation(teacher, weight, temperature, chunk)
    loss = distillation.summed_loss(student.model, student.lm_head, IDS, CPU)
    loss.backward()
    got = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    logits = student(input_ids=IDS).logits[:, :-1].double()
    with torch.no_grad():
        p = functional.softmax(teacher(input_ids=IDS).logits[:, :-1].double() / temperature, -1)
    q = functional.softmax(logits / temperature, -1)
    kl = (p * (p.log() - q.log())).sum()
    ce = functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    want = (1 - weight) * ce + weight * temperature**2 * kl
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-4)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_cannot_learn_from_itself() -> None:
    model = tiny_model("llama-gqa")
    loss = Distillation(model, 1.0, 1.0, 7).summed_loss(model.model, model.lm_head, IDS, CPU)
    assert abs(float(loss)) < 1e-4
    plain = Distillation(model, 1e-9, 1.0, 7).summed_loss(model.model, model.lm_head, IDS, CPU)
    torch.testing.assert_close(plain, summed_loss(model, IDS, CPU), rtol=1e-5, atol=1e-4)
