"""The chunked distillation loss against the plain formula in fp64, value and gradient."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from conftest import tiny_config, tiny_model
from efficientllm.models.parts import logits_of
from efficientllm.models.space import space_of
from efficientllm.training.distillation import Distillation, LiveTeacher, draws, sampled_divergence
from efficientllm.training.gradient import Precision, summed_loss
from efficientllm.training.teacher_cache import CachedTeacher

CPU = Precision("cpu", bf16=False)
IDS = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("pair", [("llama-mha-tied", "qwen2-gqa-tied"), ("gemma2-gqa-tied", "granite-gqa")])
def test_equals_the_formula(chunk: int, weight: float, pair: tuple[str, str]) -> None:
    """Capped logits and divided ones too."""
    student, teacher = tiny_model(pair[0]), tiny_model(pair[1], seed=4).eval()
    distillation = Distillation(LiveTeacher(teacher), weight, chunk)
    loss = distillation.summed_loss(student.model, logits_of(student), IDS, CPU)
    loss.backward()
    got = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    logits = student(input_ids=IDS).logits[:, :-1].double()
    with torch.no_grad():
        p = functional.softmax(teacher(input_ids=IDS).logits[:, :-1].double(), -1)
    q = functional.softmax(logits, -1)
    kl = (p * (p.log() - q.log())).sum()
    ce = functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    want = (1 - weight) * ce + weight * kl
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-4)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_cannot_learn_from_itself() -> None:
    model = tiny_model("llama-gqa")
    loss = Distillation(LiveTeacher(model), 1.0, 7).summed_loss(model.model, model.lm_head, IDS, CPU)
    assert abs(float(loss)) < 1e-4
    plain = Distillation(LiveTeacher(model), 1e-9, 7).summed_loss(model.model, model.lm_head, IDS, CPU)
    torch.testing.assert_close(plain, summed_loss(model, IDS, CPU), rtol=1e-5, atol=1e-4)


SPACE = space_of(tiny_config("qwen2-gqa-tied"))


class Asked:
    """Brings a teacher, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> PreTrainedModel:
        self.times += 1
        return tiny_model("qwen2-gqa-tied", seed=4).eval()


def loss_of(teacher: CachedTeacher | LiveTeacher, rows: torch.Tensor) -> float:
    student = tiny_model("llama-mha-tied")
    return float(Distillation(teacher, 0.6, 8).summed_loss(student.model, student.lm_head, rows, CPU).detach())


def kl_and_gradient(logits: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || softmax(logits)) of each token and its gradient to the logits, in fp64: q - p."""
    q = functional.softmax(logits.double(), -1)
    return (p * (p.log() - q.log())).sum(-1), q - p


def test_few_draws_are_right_on_average() -> None:
    """Over evenly spaced offsets, so that the average is the expectation but for the spacing: value and gradient are
    those of the whole distribution. The largest logits, normalised to one, would be off by a tenth and more."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(5, 61, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    p = functional.softmax(teacher, -1)
    want, want_gradient = kl_and_gradient(student, p)
    value, gradient, offsets = torch.zeros(5, dtype=torch.float64), torch.zeros_like(student), 4000
    for index in range(offsets):
        log_p, tokens = draws(teacher, 4, torch.full((5,), (index + 0.5) / offsets, dtype=torch.float64))
        logits = student.clone().requires_grad_()
        each = sampled_divergence(functional.log_softmax(logits, -1), log_p, tokens)
        each.sum().backward()
        value += each.detach() / offsets
        gradient += logits.grad / offsets
    torch.testing.assert_close(value, want, rtol=0, atol=5e-3)
    torch.testing.assert_close(gradient, want_gradient, rtol=0, atol=1 / (4 * offsets))
    kept = teacher.topk(4).indices
    sharp = torch.zeros_like(p).scatter(-1, kept, functional.softmax(teacher.gather(-1, kept), -1))
    assert (sharp - p).abs().max() > 0.1


def test_draws_of_a_token_are_off_by_less_than_one() -> None:
    teacher = torch.randn(7, 61, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 3
    log_p, tokens = draws(teacher, 50, torch.rand(7, dtype=torch.float64))
    p = functional.softmax(teacher, -1)
    torch.testing.assert_close(log_p.double(), p.log().gather(-1, tokens), rtol=0, atol=1e-5)
    counts = torch.zeros_like(p).scatter_add(-1, tokens, torch.ones_like(log_p, dtype=torch.float64))
    assert (counts - 50 * p).abs().max() < 1
    edges = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert draws(edges, 4, torch.tensor([0.999], dtype=torch.float64))[1].tolist() == [[1, 1, 3, 3]]
    last = draws(edges, 4, torch.tensor([1.0 - 2**-53], dtype=torch.float64))
    assert last[1][0, -1] == 3  # where rounding would end behind the last entry, which has no probability
    assert last[0].isfinite().all()


def test_many_draws_from_disk_are_the_teacher(tmp_path: Path) -> None:
    cached = CachedTeacher(tmp_path, Asked(), length=11, samples=20_000, space=SPACE)
    assert loss_of(cached, IDS) == pytest.approx(loss_of(LiveTeacher(Asked()()), IDS), rel=2e-3)


def test_the_teacher_is_asked_once_and_not_again_by_another_run(tmp_path: Path) -> None:
    asked = Asked()
    cached = CachedTeacher(tmp_path, asked, length=11, samples=5, space=SPACE)
    first = loss_of(cached, IDS)
    assert loss_of(cached, IDS.flip(0)) == pytest.approx(first, rel=1e-5)
    del cached
    again = Asked()
    cached = CachedTeacher(tmp_path, again, length=11, samples=5, space=SPACE)
    assert loss_of(cached, IDS) == first
    assert (asked.times, again.times) == (1, 0)


def test_a_row_torn_by_a_kill_is_asked_again(tmp_path: Path) -> None:
    cached = CachedTeacher(tmp_path, Asked(), length=11, samples=5, space=SPACE)
    first = loss_of(cached, IDS)
    del cached
    with (tmp_path / "tokens.bin").open("ab") as file:
        file.truncate((tmp_path / "tokens.bin").stat().st_size - 7)
    asked = Asked()
    cached = CachedTeacher(tmp_path, asked, length=11, samples=5, space=SPACE)
    assert loss_of(cached, IDS) == first
    assert asked.times == 1
    assert (tmp_path / "keys.bin").stat().st_size == 3 * 16


def test_a_disk_that_fills_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = loss_of(CachedTeacher(tmp_path / "whole", Asked(), length=11, samples=5, space=SPACE), IDS)
    cached = CachedTeacher(tmp_path / "full", Asked(), length=11, samples=5, space=SPACE)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert loss_of(cached, IDS) == expected
    assert loss_of(cached, IDS) == expected
    assert capsys.readouterr().err.count("(No space left on device); make room, set data.cache_dir to a larger") == 1
    del cached
    cached = CachedTeacher(tmp_path / "full", Asked(), length=11, samples=5, space=SPACE)
    assert loss_of(cached, IDS) == expected
    assert (tmp_path / "full" / "keys.bin").stat().st_size == 3 * 16


def test_a_second_process_reads_and_does_not_write(tmp_path: Path) -> None:
    writer = CachedTeacher(tmp_path, Asked(), length=11, samples=5, space=SPACE)
    loss_of(writer, IDS[:2])
    reader = CachedTeacher(tmp_path, Asked(), length=11, samples=5, space=SPACE)
    loss_of(reader, IDS)
    assert (tmp_path / "keys.bin").stat().st_size == 2 * 16
