"""The stem turned into its principal components: the same logits, where that can be, and a reason where it cannot."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_config, tiny_model
from efficientllm.models.parts import final_norm
from efficientllm.models.rotation import components, obstacle, rotate
from efficientllm.models.space import check_space, space_of

IDS = torch.randint(0, 61, (6, 40), generator=torch.Generator().manual_seed(5))
INPUTS = [{"input_ids": part, "use_cache": False} for part in IDS.split(2)]


def test_the_function_stays_and_the_stem_is_in_order(family: str) -> None:
    """Of every family whose stem has no obstacle: with and without biases, fused weights, multipliers of Granite."""
    model = tiny_model(family).eval()
    if obstacle(model.config):
        assert model.config.tie_word_embeddings or space_of(model.config).closing
        return
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        turn = components(model, INPUTS)
        torch.testing.assert_close(turn.T @ turn, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-10)
        rotate(model, turn)
        after = model(input_ids=IDS).logits
    assert (after - before).abs().max() < 1e-4 * max(1.0, float(before.abs().max()) / 10)
    check_space(space_of(model.config), model)
    assert final_norm(model).weight.eq(1).all()
    again = components(model, INPUTS)  # in the turned stem the components are its channels, in their order
    torch.testing.assert_close(again.abs(), torch.eye(40, dtype=torch.float64), rtol=0, atol=0.05)


def test_some_families_can_be_turned_and_others_say_why() -> None:
    for family in ("llama-gqa", "qwen3-gqa", "granite-gqa", "phi-gqa"):
        assert obstacle(tiny_config(family)) is None
    assert "LM head is its embedding" in str(obstacle(tiny_config("llama-mha-tied")))
    assert "end in norms" in str(obstacle(tiny_config("olmo2-gqa")))


@pytest.mark.parametrize("family", ["llama-gqa"])
def test_half_of_the_components_hold_more_than_half_of_the_channels(family: str) -> None:
    """What rotation is for: dropping the last components loses less of the stem's energy than dropping the weakest
    channels."""
    model = tiny_model(family).eval()
    states: list[torch.Tensor] = []
    norm = model.model.layers[1].input_layernorm
    hook = norm.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=IDS)
    hook.remove()
    turned = states[0] @ components(model, INPUTS)
    weakest = states[0].square().sum(0).sort().values[:20].sum()
    assert turned[:, 20:].square().sum() < 0.9 * weakest
