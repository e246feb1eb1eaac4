"""Pruner in a bare loop and PruningCallback in transformers' Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType as Kind
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerState, TrainingArguments

from conftest import FAMILIES, World, tiny_model
from efficientllm import Pruner, PruningCallback
from efficientllm.errors import UsageError
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.space import space_of, widths_of
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Space
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


def test_a_trainer_s_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Rows are shuffled, padded and masked, and accumulated; of one process here, of two in tests/distributed."""

    def trained(seed: int, resume: str | None = None, **changes: Any) -> tuple[Trainer, PruningCallback]:
        callback = PruningCallback(target="50%", **({"span": 0.6} | OPTIONS | changes))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            report_to=[], save_steps=4, use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        data = [
            {"input_ids": row, "labels": torch.where(torch.arange(12) < place % 9, -100, row)}
            for place, row in enumerate(torch.cat(batches(12)))
        ]
        trainer = Trainer(tiny_model("llama-gqa", seed), arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer, callback

    whole, first = trained(0)
    resumed, second = trained(1, "checkpoint-4")
    assert first.pruner.finished
    assert first.pruner.widths == second.pruner.widths
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
        for key, moment in whole.optimizer.state[one].items():
            assert torch.equal(moment, resumed.optimizer.state[two][key])
    with pytest.raises(ValueError, match="pruned with steps 6, this Pruner has 3"):
        trained(1, "checkpoint-4", span=0.3)
    file = tmp_path / "checkpoint-8" / "trainer_state.json"
    facts = json.loads(file.read_text())
    del facts["stateful_callbacks"]["PruningCallback"]
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="checkpoint of step 8 does not hold the state of one PruningCallback"):
        trained(1, "checkpoint-8")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own
def test_sft_trainer_prunes_and_goes_on_bit_for_bit(world: World, tmp_path: Path) -> None:
    """Prompts are not in the loss, rows are padded; TRL's fused head bypasses the model's own."""
    trl = pytest.importorskip("trl", reason='needs pip install "efficientllm[trl]"')
    words = ["the", "model", "learns", "to", "write", "short", "words", "and", "prunes", "its", "own", "heads"]
    rows = [
        {"prompt": " ".join(words[: 2 + n % 5]), "completion": " " + " ".join(words[n % 7 : 8 + n % 4])}
        for n in range(48)
    ]

    def trained(resume: str | None = None) -> tuple[Any, PruningCallback]:
        callback = PruningCallback(target="60%", span=0.6, **OPTIONS)
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            report_to=[], save_steps=3, use_cpu=True, disable_tqdm=True, learning_rate=1e-3, max_length=24, bf16=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(world.folder / "source"),
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(world.folder / "source"),
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer, callback

    whole, first = trained()
    counted = first.pruner._passes._replay.counted
    call = first.pruner._passes._replay._call
    assert counted is not None
    assert call is not None
    assert counted < call[1]["attention_mask"][:, 1:].sum()
    resumed, second = trained("checkpoint-3")
    assert first.pruner.finished
    assert first.pruner.widths == second.pruner.widths
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    first.pruner.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.num_parameters() == first.pruner.parameters


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_gpu": 2}, "prunes on one device a process"),
        ({"distributed_state": SimpleNamespace(distributed_type=Kind.DEEPSPEED)}, "does not know how DEEPSPEED shards"),
        ({"distributed_state": SimpleNamespace(distributed_type=Kind.MEGATRON_LM)}, "use DDP, or FSDP2"),
        ({"ddp_static_graph": True}, "leave that out"),
        ({"load_best_model_at_end": True}, "choose among the checkpoints by hand"),
        ({"restore_callback_states_from_checkpoint": True}, "takes up its state by itself"),
    ],
)
def test_a_trainer_that_shards_in_another_way_is_refused(changes: dict[str, Any], said: str) -> None:
    plain = {"n_gpu": 1, "world_size": 1, "distributed_state": None, "ddp_static_graph": None}
    plain |= {"load_best_model_at_end": False, "restore_callback_states_from_checkpoint": False}
    state, model = SimpleNamespace(global_step=0, max_steps=10), tiny_model("llama-gqa")
    given: Any = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    callback: Any = PruningCallback(target="50%")
    callback.on_train_begin(SimpleNamespace(**plain), state, None, **given)
    with pytest.raises(ValueError, match=said):
        callback.on_train_begin(SimpleNamespace(**(plain | changes)), state, None, **given)
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)
    model.model.layers[0].extra = flat
    with pytest.raises(UsageError, match="does not know FSDP1's flat weights; shard with FSDP2"):
        callback.on_train_begin(SimpleNamespace(**plain), state, None, **given)
    del model.model.layers[0].extra
    model.lm_head.weight.ds_id = 0
    with pytest.raises(UsageError, match="does not know DeepSpeed's shards"):
        callback.on_train_begin(SimpleNamespace(**plain), state, None, **given)


def test_a_trainer_that_stops_early_says_what_is_left_undone() -> None:
    model = tiny_model("llama-gqa").train()
    callback: Any = PruningCallback(target="50%")
    callback.pruner = Pruner(model, torch.optim.AdamW(model.parameters()), target="50%", steps=5, **OPTIONS)
    with pytest.warns(
        UserWarning, match=r"training ended at [\d,]+ parameters, above the target: events are left undone"
    ):
        callback.on_train_end(None, TrainerState(), None)


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
    # The callback says so before the Trainer has read anything.
    with pytest.raises(ValueError, match=r"salience.*saliency"):
        PruningCallback(target="40%", salience="magnitude")
    with pytest.raises(ValueError, match="steps from the Trainer: leave it out, and set span"):
        PruningCallback(target="40%", steps=5)
    pruner = Pruner(model, optimizer, target="40%", steps=5, **OPTIONS)
    with pytest.raises(ValueError, match="train a step first"):
        pruner._passes.gradient([])
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
