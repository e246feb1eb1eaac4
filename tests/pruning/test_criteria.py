"""Criteria that look at inputs against their fp64 reference; random; the registry."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA, Criterion, Needs, criteria_of, criterion, reach
from efficientllm.pruning.dimensions import EXPERT_TYPES, PRUNING_TYPES
from efficientllm.pruning.readers import input_scores, reader_specs
from efficientllm.pruning.saliency import drawn_scores
from efficientllm.training.hooks import captured_inputs
from reference.criteria_fp64 import unit_score

IDS = torch.randint(0, 61, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name, each in CRITERIA.items() if each.needs == "inputs"])
def test_scores_equal_the_reference(family: str, name: str) -> None:
    model = tiny_model(family)
    space = space_of(model.config)
    readers = reader_specs(space)
    with torch.no_grad(), captured_inputs(model, [spec.name for spec in readers]) as inputs:
        model(input_ids=IDS)
    if criterion(name).routed and "experts" not in space.widths.counts():
        with pytest.raises(ValueError, match=r"reap scores experts and not ffn: write prune.saliency \{expert: reap\}"):
            criteria_of(name, ["ffn"])
        return
    params = dict(model.named_parameters())
    scores = input_scores(space, criterion(name), readers, params, inputs, torch.device("cpu"))
    weights = {spec.name: params[spec.name].detach() for spec in readers}
    for pruning_type in space.types:
        if criterion(name).routed and pruning_type not in EXPERT_TYPES:
            continue
        rows, units = scores[pruning_type].shape
        for row, unit in {(0, 0), (rows - 1, units - 1), (rows // 2, units // 2)}:
            want = unit_score(name, weights, dict(inputs), space.widths, space.head_dim, pruning_type, row, unit)
            assert float(scores[pruning_type][row, unit]) == pytest.approx(want, rel=1e-3)


def test_random_is_a_function_of_the_seed() -> None:
    space = space_of(tiny_model("llama-gqa").config)
    one, same, other = (drawn_scores(space, seed) for seed in (1, 1, 2))
    for name in PRUNING_TYPES:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_unknown_criterion_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'sparsegpt'"):
        criterion("sparse-gpt")


def test_one_that_is_gone_says_what_to_take_instead() -> None:
    with pytest.raises(ValueError, match=r"'taylor-element2' is gone: .*; take taylor-element$"):
        criterion("taylor-element2")


@pytest.mark.parametrize(
    ("needs", "missing"), [("gradient", "element"), ("weights", "element"), ("inputs", "statistic")]
)
def test_one_without_its_function_is_refused_where_it_is_made(needs: Needs, missing: str) -> None:
    with pytest.raises(ValueError, match=f"criterion 'mine' looks at {needs}: give it {missing}="):
        Criterion("mine", needs, "here", "of a test", "free", column=reach)
    assert Criterion("mine", "nothing", "here", "of a test", "free").element is None


def test_an_unknown_type_or_criterion_in_the_mapping_is_named() -> None:
    with pytest.raises(ValueError, match="'fnn' is no pruning type here"):
        criteria_of({"fnn": "flap"}, PRUNING_TYPES)
    with pytest.raises(ValueError, match="'flapp'; did you mean 'flap'"):
        criteria_of({"ffn": "flapp"}, PRUNING_TYPES)
