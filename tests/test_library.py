"""Pruner in a bare loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bare_loop import OPTIONS, batches, train
from conftest import FAMILIES, tiny_model
from efficientllm import Pruner
from efficientllm.errors import UsageError
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.space import space_of, widths_of


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *((torch.optim.AdamW, family) for family in FAMILIES),
        (torch.optim.Adam, "llama-gqa"),
        (torch.optim.SGD, "phi-gqa"),
    ],
)
def test_bare_loop_compacts_and_saves(kind: type[torch.optim.Optimizer], family: str, tmp_path: Path) -> None:
    model = tiny_model(family).train()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-3, **options)  # type: ignore[call-arg]
    mixture = {"align": 8} if "moe" in family else {}  # what experts can read
    target = "80%" if family.startswith("olmoe") else "40%"  # of which experts alone fall
    pruner = Pruner(model, optimizer, target=target, steps=8, **(OPTIONS | mixture))
    steps = batches(12)
    train(model, optimizer, pruner, steps[:5])
    model, optimizer = pruner.compact()
    train(model, optimizer, pruner, steps[5:])
    assert pruner.finished
    zeroed = model(input_ids=steps[0]).logits
    pruner.save_pretrained(tmp_path / "saved")
    model, optimizer = pruner.compact()
    assert sum(weight.numel() for weight in model.parameters()) == pruner.parameters
    torch.testing.assert_close(model(input_ids=steps[0]).logits, zeroed, rtol=1e-4, atol=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(saved(input_ids=steps[0]).logits, zeroed, rtol=1e-4, atol=1e-4)
    train(model, optimizer, pruner, batches(1))


def test_compaction_in_the_middle_changes_nothing_but_the_shape() -> None:
    """Without stem events no gain is rescaled, so training after a compaction follows the zeroed model."""
    losses = []
    for compact in (False, True):
        model = tiny_model("llama-gqa").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        pruner = Pruner(
            model, optimizer, target="60%", steps=6, types=["attention", "attention_query", "ffn"], **OPTIONS
        )
        steps = batches(20)
        train(model, optimizer, pruner, steps[:8])
        if compact:
            model, optimizer = pruner.compact()
        train(model, optimizer, pruner, steps[8:])
        losses.append(float(model(input_ids=steps[0], labels=steps[0]).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bad_requests_get_one_sentence() -> None:
    model = tiny_model("llama-gqa").train()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Pruner(model, optimizer, target="40%", steps=0)
    with pytest.raises(ValueError, match="aim higher"):
        Pruner(model, optimizer, target="10%", steps=5, floors={"hidden": 30})
    with pytest.raises(ValueError, match=r"aim higher \(a share is written 40%\)"):
        Pruner(model, optimizer, target=40, steps=5)
    with pytest.raises((ValueError, UsageError), match=r"salience.*saliency"):
        Pruner(model, optimizer, target="40%", steps=5, salience="magnitude")
    with pytest.raises(ValueError, match="did you mean 'magnitude'"):
        Pruner(model, optimizer, target="40%", steps=5, saliency="magnitudes")
    with pytest.raises(ValueError, match="the optimizer has none of the model's weights"):
        Pruner(model, torch.optim.AdamW(tiny_model("llama-gqa").parameters()), target="40%", steps=5)
    with pytest.raises(ValueError, match="rotate belongs to a recipe"):
        Pruner(model, optimizer, target="40%", steps=5, rotate="auto")
    pruner = Pruner(model, optimizer, target="40%", steps=5, **OPTIONS)
    with pytest.raises(ValueError, match="train a step first"):
        pruner._passes.gradient([])
    model(input_ids=batches(1)[0]).logits.sum().backward()
    pruner.observe()
    with pytest.raises(ValueError, match="pass labels to it, or loss_fn"):
        pruner.step()


def test_what_is_dead_has_no_gradient_before_the_caller_clips() -> None:
    model = tiny_model("llama-gqa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(model, optimizer, target="95%", steps=2, types=["attention_query"], **OPTIONS)
    train(model, optimizer, pruner, batches(2))
    assert pruner.engine.held
    optimizer.zero_grad()
    for ids in batches(2):
        model(input_ids=ids, labels=ids).loss.backward()
    weights = dict(model.named_parameters())
    dead = {part.name: part for part in pruner.engine.held}
    for name, part in dead.items():
        gradient = weights[name].grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
        assert gradient.index_select(part.dim, part.indices).abs().sum() == 0
    pruner.close()
    model(input_ids=ids, labels=ids).loss.backward()
    reached = [weights[name].grad.index_select(part.dim, part.indices) for name, part in dead.items()]  # type: ignore[union-attr]
    assert any(each.abs().sum() > 0 for each in reached)  # it is the hooks that clear it


def test_a_bare_loop_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def begun(seed: int, **choices: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = tiny_model("llama-gqa", seed).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, Pruner(model, optimizer, **({"target": "50%", "steps": 6} | OPTIONS | choices))

    steps = batches(8)
    model, optimizer, pruner = begun(0)
    train(model, optimizer, pruner, steps[:3])
    saved = [model.state_dict(), optimizer.state_dict(), pruner.state_dict()]
    torch.save(saved, tmp_path / "state.pt")
    train(model, optimizer, pruner, steps[3:])
    assert pruner.finished
    weights, moments, pruned = torch.load(tmp_path / "state.pt", weights_only=True)
    for odd, said in (({"steps": 7}, "pruned with steps 6, this Pruner has 7"), ({"target": "60%"}, "with target")):
        with pytest.raises(ValueError, match=said):
            begun(1, **odd)[2].load_state_dict(pruned)
    again, other, resumed = begun(1)
    again.load_state_dict(weights)
    other.load_state_dict(moments)
    resumed.load_state_dict(pruned)
    train(again, other, resumed, steps[3:])
    assert resumed.widths == pruner.widths
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), model.parameters(), strict=True))
    older = pruned | {"facts": {name: each for name, each in pruned["facts"].items() if name != "saliency_scale"}}
    taken_anew = begun(1)[2]
    with pytest.warns(UserWarning, match="an earlier version's scores are in another unit"):
        taken_anew.load_state_dict(older)
    assert not taken_anew.engine.looks.complete
    pruner.compact()
    with pytest.raises(ValueError, match=r"pruned with allocated .* not compacted"):
        begun(1)[2].load_state_dict(pruner.state_dict())


def test_saliency_must_have_been_seen() -> None:
    """Neither a forgotten observe() nor one after zero_grad() may prune by index order, in any step."""
    model = tiny_model("llama-gqa").train()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), target="40%", steps=5, **OPTIONS)
    with pytest.raises(ValueError, match="after backward"):
        pruner.observe()
    with pytest.raises(ValueError, match="call observe"):
        pruner.step()
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    pruner.observe()
    pruner.step()
    with pytest.raises(ValueError, match="call observe"):
        pruner.step()


def test_saving_never_deletes_what_is_not_a_model(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa").train()
    model.generation_config.eos_token_id = [3, 4]
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), target="40%", steps=5, **OPTIONS)
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(UsageError, match=r"holds checkpoint-5, which an export would delete"):
        pruner.save_pretrained(tmp_path)
    pruner.save_pretrained(tmp_path / "model")
    pruner.save_pretrained(tmp_path / "model")  # its own folder may be replaced
    assert model.generation_config.eos_token_id == [3, 4]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id == [3, 4]


def test_half_precision_weights_are_refused() -> None:
    model = tiny_model("llama-gqa").to(torch.bfloat16)
    with pytest.raises(ValueError, match="needs fp32 weights"):
        Pruner(model, torch.optim.AdamW(model.parameters()), target="40%", steps=5)


def test_another_cost_in_a_bare_loop() -> None:
    model = tiny_model("llama-gqa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"target": {"flops": "50%"}, "cost": "flops", "steps": 6} | OPTIONS
    with pytest.raises(ValueError, match="give sequence_length"):
        Pruner(model, optimizer, **options)
    cost = FlopsPerToken(space_of(model.config), 12)
    source = cost(widths_of(model.config))
    pruner = Pruner(model, optimizer, sequence_length=12, **options)
    train(model, optimizer, pruner, batches(4))
    model, optimizer = pruner.compact()
    train(model, optimizer, pruner, batches(4))
    assert pruner.finished
    wider = pruner.widths.changed(intermediate=pruner.widths.intermediate + 1)
    assert cost(pruner.widths) <= 0.5 * source < cost(wider)
