"""Groups against masks written out by hand, and: zeroing a unit is the same as cutting it."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from efficientllm.models.space import build, check_space, narrowed_config, of_layers, space_of
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.live import Live
from efficientllm.pruning.shards import fill
from efficientllm.pruning.slices import group_slices
from efficientllm.pruning.surgery import choose_kept, cut_live, cut_state
from efficientllm.pruning.widths import Widths
from reference.groups_fp64 import group_masks


def random_event(live: Live, pruning_type: str, seed: int) -> Removal:
    """One random live unit of every live row."""
    generator = torch.Generator().manual_seed(seed)
    units = live.units(pruning_type)
    noise = torch.rand(units.shape, generator=generator).masked_fill(~units, -1.0)
    chosen = noise.argmax(1)
    return Removal(pruning_type, torch.where(units.any(1), chosen, -1))


def test_the_space_counts_every_parameter(family: str) -> None:
    model = tiny_model(family)
    space = space_of(model.config)
    check_space(space, model)
    assert space.num_params() == sum(weight.numel() for weight in model.parameters())


def test_slices_are_the_hand_written_groups(family: str) -> None:
    model = tiny_model(family)
    space = space_of(model.config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    live = Live.full(space.widths)
    for pruning_type in space.types:
        event = random_event(live, pruning_type, seed=3)
        got = {name: torch.ones(shape) for name, shape in shapes.items()}
        for part in group_slices(space, [event]):
            fill(got[part.name], part.dim, part.indices, part.rows)
        want = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
        for row, unit in enumerate(event.units.tolist()):
            masks = group_masks(shapes, space.widths, space.head_dim, pruning_type, row, unit)
            for name, mask in masks.items():
                want[name] |= mask
        for name in shapes:
            assert torch.equal(got[name] == 0.0, want[name]), (pruning_type, name)
        fallen = sum(int(mask.sum()) for mask in want.values())
        assert fallen == space.event_cost(pruning_type, space.widths)


def test_zeroing_is_cutting(family: str) -> None:
    """Zeroed and cut models give the same logits within 1e-4 of logits of magnitude 10, untied and tied."""
    types = space_of(tiny_model(family).config).types
    for some in [*((each,) for each in types), types]:
        zeroed_is_cut(family, some)


def zeroed_is_cut(family: str, types: tuple[str, ...]) -> None:
    model = tiny_model(family)
    space = space_of(model.config)
    live = Live.full(space.widths)
    for seed in range(2):
        for pruning_type in types:
            if live.widths().count(pruning_type) <= space.least(pruning_type):
                continue
            event = random_event(live, pruning_type, seed)
            live.remove(event)
            for part in group_slices(space, [event]):
                fill(model.get_parameter(part.name), part.dim, part.indices, part.rows)
    ids = torch.arange(48).reshape(3, 16)
    zeroed = model(input_ids=ids).logits
    kept = choose_kept(live, live.widths())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    narrow, _ = cut_state(space, kept, weights, {})
    layers = of_layers(model.config.to_dict(), kept.units["layers"].tolist())
    config = narrowed_config(model.config, live.widths(), layers)
    cut = build(config)
    for name, weight in cut.named_parameters():
        weight.detach().copy_(narrow[name])
    assert sum(weight.numel() for weight in cut.parameters()) == space.num_params(live.widths())
    assert all(map(torch.all, cut_live(live, kept).values()))
    torch.testing.assert_close(cut(input_ids=ids).logits, zeroed, rtol=1e-4, atol=1e-4)


def test_cutting_nothing_changes_no_bit(family: str) -> None:
    model = tiny_model(family)
    space = space_of(model.config)
    kept = choose_kept(Live.full(space.widths), space.widths)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    moments = {
        name: {"exp_avg": weight * 0.1, "exp_avg_sq": weight**2, "step": torch.tensor(3.0)}
        for name, weight in weights.items()
    }
    cut_weights, cut_moments = cut_state(space, kept, weights, moments)
    for name in weights:
        assert torch.equal(cut_weights[name], weights[name])
        assert cut_weights[name].data_ptr() != weights[name].data_ptr()
        for key, moment in moments[name].items():
            assert torch.equal(cut_moments[name][key], moment)


def test_a_dead_unit_cannot_be_taken_twice() -> None:
    live = Live.full(space_of(tiny_model("llama-gqa").config).widths)
    event = random_event(live, "ffn", seed=0)
    live.remove(event)
    with pytest.raises(ValueError, match="dead already"):
        live.remove(event)


def test_a_word_that_is_no_pruning_type_is_refused() -> None:
    """It must not be taken for the last type of a list."""
    widths = Widths(2, 40, 4, 2, 52)
    live = Live.full(widths)
    with pytest.raises(ValueError, match="'heads' is no pruning type here; choose among attention"):
        widths.after("heads")
    with pytest.raises(ValueError, match="'heads' is no pruning type"):
        live.units("heads")
    with pytest.raises(KeyError, match="heads"):
        live.entries("heads", 0, 6)
