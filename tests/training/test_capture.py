"""Captured inputs: what the layers were given, shared where they share, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from efficientllm.training.capture import captured_inputs

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


def test_nothing_is_left_behind() -> None:
    model = tiny_model("llama-gqa")
    hooks = []

    def fail() -> None:
        with captured_inputs(model, names("mlp.down")):
            hooks.extend(module for module in model.modules() if module._forward_pre_hooks)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(hooks) == 1
    assert not any(module._forward_pre_hooks for module in model.modules())
