"""Pruner in a bare loop and PruningCallback in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from conftest import FAMILIES, tiny_model
from efficientllm import Pruner, PruningCallback
from efficientllm.errors import UsageError
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.space import space_of, widths_of
from efficientllm.pruning.gates import GateSums
from efficientllm.training.capture import watched_gates

OPTIONS = {"floors": {"intermediate": 8}, "align": 4, "bound": 0.05}


def batches(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 61, (4, 12), generator=generator) for _ in range(number)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: list[torch.Tensor]) -> None:
    for ids in steps:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()


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
    pruner = Pruner(model, optimizer, target="40%", steps=8, **OPTIONS)
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
        losses.append(float(model(input_ids=steps[0], labels=steps[0]).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_trainer_callback(tmp_path: Path) -> None:
    model = tiny_model("qwen2-gqa-tied")
    callback = PruningCallback(target="50%", span=0.5, **OPTIONS)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.cat(batches(12))]
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    pruner = callback.pruner
    assert pruner.finished
    assert pruner.calls == 10
    pruner.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (
        sum(weight.numel() for weight in saved.parameters())
        == pruner.parameters
        <= 0.5 * sum(weight.numel() for weight in model.parameters())
    )


def test_bad_requests_get_one_sentence() -> None:
    model = tiny_model("llama-gqa").train()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Pruner(model, optimizer, target="40%", steps=0)
    with pytest.raises(ValueError, match="aim higher"):
        Pruner(model, optimizer, target="10%", steps=5, floors={"hidden": 30})
    with pytest.raises((ValueError, UsageError), match=r"salience.*saliency"):
        Pruner(model, optimizer, target="40%", steps=5, salience="magnitude")
    with pytest.raises(ValueError, match="did you mean 'magnitude'"):
        Pruner(model, optimizer, target="40%", steps=5, saliency="magnitudes")
    pruner = Pruner(model, optimizer, target="40%", steps=5, **OPTIONS)
    with pytest.raises(ValueError, match="train a step first"):
        pruner._passes.measure()()
    model(input_ids=batches(1)[0]).logits.sum().backward()
    pruner.observe()
    with pytest.raises(ValueError, match="pass labels to it, or loss_fn"):
        pruner.step()


def test_the_caller_s_own_passes_are_watched() -> None:
    """Gates of two micro-batches, seen on the way, are those of a look at both at once; no pass of the pruner's own."""
    torch.manual_seed(0)
    ids = torch.randint(0, 61, (4, 12))
    watched, looked = tiny_model("llama-gqa").train(), tiny_model("llama-gqa").train()
    pruner = Pruner(watched, torch.optim.AdamW(watched.parameters()), target="40%", steps=5, start=3, **OPTIONS)
    for _ in range(3):  # nothing is due, so nothing is watched
        watched(input_ids=ids, labels=ids).loss.backward()
        pruner.observe()
        pruner.step()
    for part in ids.split(2):
        (watched(input_ids=part, labels=part).loss / 2).backward()
    watched.eval()(input_ids=ids)
    with torch.no_grad():
        watched.train()(input_ids=ids)
    own = pruner._passes.gates()
    assert own is not None
    assert pruner._passes.gates() is None
    gates = GateSums(pruner.engine.space, torch.device("cpu"))
    with watched_gates(looked, pruner.engine.space, gates) as watch:
        with watch(0):
            loss = looked(input_ids=ids, labels=ids).loss
        loss.backward()
    for name, scores in gates.scores().items():
        torch.testing.assert_close(own.scores()[name], scores, rtol=1e-4, atol=1e-9)


def test_saliency_must_have_been_seen() -> None:
    """Neither a forgotten observe() nor one after zero_grad() may prune by index order."""
    model = tiny_model("llama-gqa").train()
    pruner = Pruner(model, torch.optim.AdamW(model.parameters()), target="40%", steps=1, **OPTIONS)
    with pytest.raises(ValueError, match="after backward"):
        pruner.observe()
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
    with pytest.raises(ValueError, match="Pruner takes sequence_length"):
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
