"""Captured inputs: what the layers were given, shared where they share, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from efficientllm.models.space import space_of
from efficientllm.pruning.readers import reader_specs
from efficientllm.training.hooks import captured_inputs

IDS = torch.arange(48).reshape(3, 16)


def names(*parts: str) -> list[str]:
    return [f"model.layers.1.{part}_proj.weight" for part in parts]


def test_inputs_explain_outputs() -> None:
    model = tiny_model("llama-gqa").double()
    wanted = names("self_attn.q", "self_attn.k", "mlp.down")
    outputs: dict[str, torch.Tensor] = {}
    for name in wanted:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out.flatten(0, 1)}))
    with captured_inputs(model, wanted) as inputs:
        model(input_ids=IDS)
    assert sorted(inputs) == sorted(wanted)
    for name in wanted:
        torch.testing.assert_close(inputs[name] @ model.get_parameter(name).T, outputs[name])
    assert inputs[wanted[0]] is inputs[wanted[1]]


def test_calls_are_joined_up_to_the_limit() -> None:
    model = tiny_model("llama-mha-tied").eval()
    wanted = names("mlp.gate", "mlp.up", "self_attn.o")
    with captured_inputs(model, wanted) as whole:
        model(input_ids=IDS)
    with captured_inputs(model, wanted, limit=40) as parts:
        for rows in IDS.split(1):
            model(input_ids=rows)
    for name in wanted:
        torch.testing.assert_close(parts[name], whole[name][:40], rtol=1e-4, atol=1e-5)
    assert parts[wanted[0]] is parts[wanted[1]]


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-gqa-tied", "qwen3-moe-gqa"])
@pytest.mark.parametrize(("left", "every"), [(False, 1), (True, 1), (False, 2)])
def test_padding_is_left_out(family: str, left: bool, every: int) -> None:
    """Inputs of padded rows are those of the rows as they are, one by one, and of experts, which sort them, as many of
    the same products."""
    model = tiny_model(family).eval()
    wanted = [spec.name for spec in reader_specs(space_of(model.config))]
    lengths = (16, 9, 4)
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(lengths):
        place = slice(16 - length, None) if left else slice(length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    with captured_inputs(model, wanted, every=every) as padded, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    with captured_inputs(model, wanted) as alone, torch.no_grad():
        for row, length in list(enumerate(lengths))[::every]:
            model(input_ids=IDS[row : row + 1, :length])
    assert padded.keys() == alone.keys()
    for name in padded:
        got, expected = padded[name], alone[name]
        assert got.shape == expected.shape
        if ".experts." in name:
            got, expected = got.T @ got, expected.T @ expected
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_behind() -> None:
    model = tiny_model("llama-gqa")
    hooks = []

    def fail() -> None:
        with captured_inputs(model, names("mlp.down")):
            hooks.extend(module for module in model.modules() if module._forward_pre_hooks)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(hooks) == 2  # of the layer, and of the body, which is told what is padding
    assert not any(module._forward_pre_hooks for module in model.modules())
