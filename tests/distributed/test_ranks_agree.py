"""One process against two and four: the same events, the same weights within rounding, checkpoints for any number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from distributed.scenario import Case, assert_close, main, outcome, play
from efficientllm.distributed.ranks import ALONE
from processes import codes, start_ranks

pytestmark = pytest.mark.slow
TWO = [
    Case("full-correction"),
    Case("full-wanda", family="gemma2-gqa-tied", criterion="wanda", steps=3),
    Case("full-fused", family="phi-gqa", correction="none", steps=3),
    Case(
        "full-sparsegpt", family="mistral-gqa-tied", criterion="sparsegpt", correction="none", loss="chunked", steps=3
    ),
    Case(
        "full-mixed",
        family="qwen3-gqa",
        criterion={"ffn": "activation", "stem": "gate-fisher", "attention": "gate-fisher"},
        target={"hidden": 28, "heads": 2, "kv_heads": 1, "intermediate": 32},
        correction="none",
        steps=3,
    ),
    Case("full-hidden", criterion="gate-fisher", correction="none", steps=4, planes=3, hidden=1.0),
    Case("full-labels", criterion="gate-fisher", correction="none", steps=3, planes=3),
    Case(
        "full-experts",
        family="qwen3-moe-gqa",
        criterion={"expert": "reap", "expert_ffn": "gate-fisher"},
        target={"experts": 3, "intermediate": 8, "hidden": 24},
        steps=5,
    ),
    Case(
        "full-experts-open",
        family="qwen3-moe-gqa",
        criterion="gate-fisher",
        target="40%",
        correction="none",
        steps=4,
    ),
    Case("none-fisher", family="qwen2-gqa-tied", shard="none", criterion="fisher", correction="none"),
]
FOUR = [
    Case("hybrid-signed", family="qwen2-gqa-tied", shard="hybrid", criterion="taylor-vector", steps=3, leave="of-four"),
]


def play_on(processes: int, cases: Sequence[Case], folder: Path) -> None:
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    log = folder / "log"
    assert set(codes(start_ranks(processes, log, main, folder))) == {0}, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on several processes and, as NAME-alone, on one; checkpoints left by 4, 2 and 1 of them, gone on with
    by other numbers."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in (*TWO, *FOUR):
        play(replace(case, name=f"{case.name}-alone", leave=""), ALONE, folder)
    play(Case("one-leaves", steps=3, leave="of-one"), ALONE, folder)
    play_on(4, FOUR, folder)
    found = replace(FOUR[0], begin="of-four", leave="")
    others = [
        replace(found, name="two-find-of-four", shard="full", leave="of-two"),
        replace(found, name="copies-find-of-four", shard="none"),
        Case("two-go-on-from-one", begin="of-one"),
    ]
    play_on(2, [*TWO, *others], folder)
    play(replace(found, name="one-finds-of-two", begin="of-two"), ALONE, folder)
    return folder


@pytest.mark.parametrize("name", [case.name for case in (*TWO, *FOUR)])
def test_as_on_one_process(played: Path, name: str) -> None:
    """While no two units are so close that they change places."""
    (facts, tensors), (alone, expected) = outcome(played, name), outcome(played, f"{name}-alone")
    assert facts["events"] == alone["events"]
    assert len(alone["events"]) > 10
    assert facts["compactions"] == alone["compactions"] != 0
    assert facts["widths"] == alone["widths"]
    assert facts["counts"][:3] == alone["counts"][:3]
    # Solves of the correction may take an iteration more or less.
    assert facts["counts"][3] == pytest.approx(alone["counts"][3], rel=0.02)
    assert facts["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert_close(tensors, expected)


@pytest.mark.parametrize("name", ["two-find-of-four", "copies-find-of-four", "one-finds-of-two"])
def test_a_checkpoint_serves_any_number_of_processes(played: Path, name: str) -> None:
    (facts, tensors), (left, expected) = outcome(played, name), outcome(played, "hybrid-signed")
    assert facts["counts"] == left["counts"]
    assert facts["widths"] == left["widths"]
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key


def test_two_processes_go_on_where_one_has_stopped(played: Path) -> None:
    (facts, tensors), (alone, expected) = (
        outcome(played, "two-go-on-from-one"),
        outcome(played, "full-correction-alone"),
    )
    first, _ = outcome(played, "one-leaves")
    assert [*first["events"], *facts["events"]] == alone["events"]
    assert_close(tensors, expected)
