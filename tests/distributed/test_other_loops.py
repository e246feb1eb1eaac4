"""Other people's loops on two processes: the same events and weights on both, as one process on the joint batch; killed
and resumed from the Trainer's checkpoint, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from distributed.loops import HAND, by_hand
from distributed.scenario import assert_close, outcome
from distributed.trainers import SFT, TRAINER, in_trainer, killed, main
from processes import codes, start_ranks

pytest.importorskip("accelerate", reason='needs pip install "efficientllm[trainer]"')
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loops")
    log = folder / "log"
    assert set(codes(start_ranks(2, log, killed, folder))) == {-9}, log.read_text()[-3000:]
    assert set(codes(start_ranks(2, log, main, folder))) == {0}, log.read_text()[-3000:]
    return folder


def assert_same_bits(one: tuple[Any, dict[str, torch.Tensor]], other: tuple[Any, dict[str, torch.Tensor]]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for key, value in one[1].items():
        assert torch.equal(value, other[1][key]), key


def need_trl(case: Any) -> None:
    if case.sft:
        pytest.importorskip("trl", reason='needs pip install "efficientllm[trl]"')


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own
@pytest.mark.filterwarnings("ignore:scores of taylor-element compare its types by scale only")
@pytest.mark.parametrize("case", [*HAND, *TRAINER, *SFT], ids=lambda case: case.name)
def test_as_one_process_on_the_joint_batch(played: Path, case: Any) -> None:
    """fp32 sums in another order, as in test_ranks_agree; bf16 rounds elsewhere, and is held to the ranks alone."""
    need_trl(case)
    both = outcome(played, f"{case.name}-2-0"), outcome(played, f"{case.name}-2-1")
    assert_same_bits(*both)
    saved = AutoModelForCausalLM.from_pretrained(played / f"{case.name}-2-model")
    (events, widths), tensors = both[0]
    assert saved.config.intermediate_size == widths["intermediate"]
    assert saved.num_parameters() <= 0.5 * tiny_model(case.family).num_parameters()
    embedding = tensors["model.embed_tokens.weight"]
    if not case.compact:
        assert torch.equal(saved.model.embed_tokens.weight, embedding[:, embedding.any(dim=0)])
    if case.bf16:
        return
    (by_hand if case in HAND else in_trainer)(case, played)
    (alone, narrow), expected = outcome(played, f"{case.name}-1-0")
    assert events == alone
    assert len(events) > 5 or case not in HAND
    assert widths == narrow
    assert_close(tensors, expected)


@pytest.mark.parametrize("case", [*TRAINER, *SFT], ids=lambda case: case.name)
def test_the_trainer_s_checkpoint_goes_on_bit_for_bit(played: Path, case: Any) -> None:
    """Of the first both processes were killed two steps after the checkpoint, in the middle of the pruning."""
    need_trl(case)
    for rank in (0, 1):
        assert_same_bits(*(outcome(played, f"{case.name}{resumed}-2-{rank}") for resumed in ("-resumed", "")))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_had_is_said_in_one_sentence_and_advice_once(played: Path, rank: int) -> None:
    said = json.loads((played / f"said-{rank}.json").read_text())
    none, split, part, compact = said["refused"]
    assert none.startswith("this is one of 2 processes, and Pruner has not been told which of them train its model: ")
    assert "process_group=torch.distributed.group.WORLD" in none
    assert "no tensor parallelism: leave that out" in split
    assert "shard the whole model on one mesh" in part
    assert compact.startswith("compact() cannot replace a model inside its shards; ")
    parts = (
        ["compare its types by scale only", "scores are in another unit", "events are left undone"] if not rank else []
    )
    assert len(said["warned"]) == len(parts)
    assert all(part in advice for part, advice in zip(parts, said["warned"], strict=True))
