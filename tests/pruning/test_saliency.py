"""Scores against the fp64 reference, and the first-order score against a finite difference of the loss."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from efficientllm.models.experts import is_mixture
from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA, criterion
from efficientllm.pruning.saliency import MovingAverage, unit_scores
from reference.groups_fp64 import group_masks, unit_saliency

IDS = torch.arange(64).reshape(4, 16) % 61


def graded_model(family: str) -> torch.nn.Module:
    model = tiny_model(family)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return model


def offset_of(name: str, model: torch.nn.Module) -> float:
    """What is added to a weight before it multiplies; of Gemma's norms on the stem 1."""
    gemma = type(model).__name__.startswith("Gemma") and "norm" in name
    return float(gemma and not name.endswith(("q_norm.weight", "k_norm.weight")))


class Norm(torch.nn.Module):
    """An RMSNorm by the formula; Gemma's gain is 1 + w."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.offset = norm.weight, float(type(norm).__name__.startswith("Gemma"))
        self.eps: float = getattr(norm, "variance_epsilon", None) or norm.eps  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.offset + self.weight) * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def fp64_model(family: str) -> torch.nn.Module:
    """The model in fp64 throughout: transformers' RMSNorm computes in fp32 whatever it is given."""
    model = tiny_model(family)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Norm(child))
    if is_mixture(model.config):
        model.set_experts_implementation("eager")  # the others know no fp64
    return model.double()


def fp64_loss(model: torch.nn.Module) -> torch.Tensor:
    """transformers computes its loss in fp32; a finite difference needs more."""
    logits = model(input_ids=IDS).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("name", [name for name, each in CRITERIA.items() if each.element])
def test_scores_equal_the_reference(family: str, name: str) -> None:
    model = graded_model(family)
    space = space_of(model.config)
    weights = {key: weight.detach() for key, weight in model.named_parameters()}
    grads = {key: weight.grad for key, weight in model.named_parameters()}
    parts = ((spec, weights[spec.name], grads[spec.name]) for spec in space.params)
    scores = unit_scores(space, criterion(name), parts, torch.device("cpu"))
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    gains = {key: weight + offset_of(key, model) for key, weight in weights.items()}
    for pruning_type in space.types:
        rows, units = scores[pruning_type].shape
        for row, unit in {(0, 0), (rows - 1, units - 1), (rows // 2, units // 2)}:
            masks = group_masks(shapes, space.widths, space.head_dim, pruning_type, row, unit)
            want = unit_saliency(name, masks, gains, grads)
            assert float(scores[pruning_type][row, unit]) == pytest.approx(want, rel=2e-4, abs=1e-6)


def test_taylor_vector_is_the_slope_of_the_loss(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaling a unit by 1 - h changes the loss by -h * sum(g w) to first order (central difference in fp64)."""
    softmax = torch.nn.functional.softmax  # which eager attention asks for fp32
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype: softmax(scores, dim=dim))
    model = fp64_model(family)
    fp64_loss(model).backward()
    space = space_of(model.config)
    params = dict(model.named_parameters())
    parts = ((spec, params[spec.name].detach(), params[spec.name].grad) for spec in space.params)
    scores = unit_scores(space, criterion("taylor-vector"), parts, torch.device("cpu"))
    shapes = {key: tuple(weight.shape) for key, weight in params.items()}
    originals = {key: weight.detach().clone() for key, weight in params.items()}
    offsets = {key: offset_of(key, model) for key in params}
    h = 1e-4
    for pruning_type in space.types:
        masks = group_masks(shapes, space.widths, space.head_dim, pruning_type, 0, 0)
        losses = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for key, weight in params.items():
                    weight.copy_(
                        torch.where(masks[key], sign * h * (originals[key] + offsets[key]), 0.0) + originals[key]
                    )
                losses.append(float(fp64_loss(model)))
        slope = abs(losses[0] - losses[1]) / (2 * h)
        assert float(scores[pruning_type][0, 0]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_moving_average_has_no_bias_at_its_start() -> None:
    average = MovingAverage()
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    average.update({"ffn": first}, 0.3)
    torch.testing.assert_close(average.values()["ffn"], first)
    average.update({"ffn": second}, 0.9)
    torch.testing.assert_close(average.values()["ffn"], (0.9 * first + second) / 1.9)


def test_looks_of_unequal_size_count_alike() -> None:
    """A look whose scores are ten times larger changes the unit that they are in, not the shares of the units."""
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    shares = []
    for size in (1.0, 10.0):
        average = MovingAverage()
        average.update({"ffn": first}, 0.5)
        average.update({"ffn": size * second}, 0.5)
        unit = (0.5 * 3.0 + size * 4.0) / 1.5
        assert float(average.values()["ffn"].sum()) == pytest.approx(unit)
        shares.append(average.values()["ffn"] / unit)
    torch.testing.assert_close(*shares)
    torch.testing.assert_close(shares[0], (0.5 * first / 3.0 + second / 4.0) / 1.5)
