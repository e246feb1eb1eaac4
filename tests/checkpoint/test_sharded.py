"""What one process cannot read or write is told to all: none may wait for one that has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from efficientllm.checkpoint import sharded, store
from efficientllm.checkpoint.sharded import agreed, read_shards, write_shards
from efficientllm.distributed.ranks import ALONE, Ranks, World
from efficientllm.errors import UsageError


class Second(Ranks):
    """One of two processes, the other of which gives the same word or the one that is set."""

    others: Any = None

    def gathered(self, part: Any) -> list[Any]:
        return [part, self.others or part]


def refuse() -> str:
    raise OSError(5, "Input/output error")


def test_what_one_disk_refuses_is_raised_on_all() -> None:
    ranks = Second()
    assert agreed(ranks, lambda: "mine") == ["mine", "mine"]
    with pytest.raises(OSError, match="Input/output error"):
        agreed(ranks, refuse)
    ranks.others = (None, "Stale file handle")
    with pytest.raises(OSError, match="rank 1: Stale file handle"):
        agreed(ranks, lambda: "mine")


def test_a_disk_that_is_slow_is_no_hung_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    ranks, patient = Ranks(), list[bool]()
    real = sharded.dcp.load
    monkeypatch.setattr(sharded.dcp, "load", lambda *a, **k: patient.append(ranks.patient) or real(*a, **k))
    monkeypatch.setattr(Ranks, "gathered", lambda self, part: [part])
    assert torch.equal(read_shards(tmp_path, ranks, "cpu")["weight"], torch.ones(2))
    assert patient == [True]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process writes here
def test_a_disk_that_fails_while_shards_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr("efficientllm.checkpoint.sharded.size_and_crc", lambda file: refuse())
    monkeypatch.setattr(World, "gathered", lambda self, part: said.append(part) or [part])
    with pytest.raises(OSError, match="Input/output error"):
        write_shards(tmp_path, {"weight": torch.ones(2)}, ALONE)
    assert said == [(None, "[Errno 5] Input/output error")]  # before it leaves


@pytest.mark.parametrize(("version", "age"), [(0, "older"), (99, "newer")])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, version: int, age: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": version, "efficientllm": "0.0.1"}))
    with pytest.raises(
        UsageError, match=rf"written by efficientllm 0\.0\.1, which is {age} than .* install that version"
    ):
        store.load(tmp_path)


def test_a_checkpoint_that_cannot_be_read_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"weights.safetensors": {"bytes": 1, "crc32": 0}}
    manifest = {"format": 1, "files": files, "config": {}, "pruner": None} | dict.fromkeys(
        ["step", "tokens", "refresh_tokens"], 0
    )
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    monkeypatch.setattr(store, "size_and_crc", lambda file: refuse())
    with pytest.raises(UsageError, match=r"cannot be read \(.*Input/output error\); mend the disk"):
        store.load(tmp_path)
    monkeypatch.setattr(store, "size_and_crc", lambda file: files[file.name])
    monkeypatch.setattr(store, "read_shards", lambda *_: refuse())
    with pytest.raises(UsageError, match=r"cannot be read \(.*Input/output error\); mend the disk"):
        store.load(tmp_path)
