"""PruningCallback in transformers' Trainer and TRL's SFTTrainer."""

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

from bare_loop import OPTIONS, batches
from conftest import World, tiny_model
from efficientllm import Pruner, PruningCallback
from efficientllm.errors import UsageError

USUAL: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
USUAL |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}


def test_a_trainer_prunes_and_its_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Rows are shuffled, padded and masked, and accumulated; of one process here, of two in tests/distributed."""

    def trained(seed: int, resume: str | None = None, **changes: Any) -> tuple[Trainer, PruningCallback]:
        callback = PruningCallback(target="50%", **({"span": 0.6} | OPTIONS | changes))
        arguments = TrainingArguments(str(tmp_path), max_steps=10, save_steps=4, **USUAL)
        data = [
            {"input_ids": row, "labels": torch.where(torch.arange(12) < place % 9, -100, row)}
            for place, row in enumerate(torch.cat(batches(12)))
        ]
        trainer = Trainer(tiny_model("qwen2-gqa-tied", seed), arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer, callback

    whole, first = trained(0)
    resumed, second = trained(1, "checkpoint-4")
    assert first.pruner.finished
    assert first.pruner.calls == 10
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
    first.pruner.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.num_parameters() == first.pruner.parameters <= 0.5 * whole.model.num_parameters()


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
        arguments = trl.SFTConfig(str(tmp_path), max_steps=8, save_steps=3, max_length=24, bf16=False, **USUAL)
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


def test_bad_requests_get_one_sentence_before_the_trainer_has_read_anything() -> None:
    with pytest.raises(ValueError, match=r"salience.*saliency"):
        PruningCallback(target="40%", salience="magnitude")
    with pytest.raises(ValueError, match="steps from the Trainer: leave it out, and set span"):
        PruningCallback(target="40%", steps=5)
