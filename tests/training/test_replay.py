"""What Pruner sees of somebody else's passes, and its own over the same batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bare_loop import OPTIONS, batches, train
from conftest import tiny_model
from efficientllm import Pruner
from efficientllm.models.space import space_of
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Space
from efficientllm.training.hooks import watched_gates


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


def looked(model: nn.Module, space: Space, **call: torch.Tensor) -> dict[str, torch.Tensor]:
    gates = GateSums(space, torch.device("cpu"))
    with watched_gates(model, space, gates) as watch:
        with watch(0):
            loss = model(**call).loss
        loss.backward()
    return dict(gates.scores())


def test_padding_and_masked_labels_are_no_predictions() -> None:
    """Rows with padding, or in which no label counts, score as the same rows without, on the way and in a look."""
    torch.manual_seed(0)
    ids = torch.randint(1, 61, (4, 12))
    longer, mask = torch.zeros(6, 20, dtype=torch.int64), torch.zeros(6, 20, dtype=torch.int64)
    longer[:4, :12], mask[:4, :12], longer[4:], mask[4:, 0] = ids, 1, 7, 1
    labels = torch.where(mask == 1, longer, -100)
    plain, padded = tiny_model("llama-gqa").train(), tiny_model("llama-gqa").train()
    expected = looked(plain, space_of(plain.config), input_ids=ids, labels=ids)
    pruner = Pruner(padded, torch.optim.AdamW(padded.parameters()), target="40%", steps=5, **OPTIONS)
    padded(input_ids=longer, attention_mask=mask, labels=labels).loss.backward()
    own = pruner._passes.gates()
    again = GateSums(pruner.engine.space, torch.device("cpu"))
    pruner._passes.gradient([], again)
    assert own is not None
    for scores in (own.scores(), again.scores()):
        for name, score in expected.items():
            torch.testing.assert_close(scores[name], score, rtol=1e-4, atol=1e-9)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for call in ({"shift_labels": shifted, "labels": longer}, {"attention_mask": mask}):
        padded(input_ids=longer, **call)
        assert pruner._passes._replay.counted == 4 * 11


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "blocks"])
def test_a_compiled_model_is_looked_at_without_the_compiler(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's graph stays whole, and the events are those of an eager loop whose own passes are not watched."""

    def pruned(compiled: bool) -> Pruner:
        model = tiny_model("llama-gqa", num_hidden_layers=1).train()
        # So that rounding moves no weight whose gradient is all but zero.
        optimizer, call = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3), model
        if compiled and how == "model":
            call = torch.compile(model, backend="aot_eager")
        if compiled and how == "blocks":
            model.model.layers[0].compile(backend="aot_eager")
        pruner = Pruner(call, optimizer, target="50%", steps=3, **(OPTIONS | {"correction": "none"}))
        train(call, optimizer, pruner, batches(3))
        return pruner

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = pruned(True)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    monkeypatch.setattr("efficientllm.training.replay.CurrentBatch._is_scaled", lambda self: True)
    eager = pruned(False)
    assert compiled.finished
    assert compiled.widths == eager.widths
    for one, two in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
