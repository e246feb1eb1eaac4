"""A run remembers by what its last bits were made, and says once where they will be made otherwise."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from conftest import World
from efficientllm.jobs.device import CUBLAS, arithmetic, deterministic, other_bits
from processes import call


def test_what_differs_is_said_and_nothing_else() -> None:
    here = arithmetic(torch.device("cpu"))
    assert here == {"threads": torch.get_num_threads(), "cpu_kernels": torch.backends.cpu.get_cpu_capability()}
    assert arithmetic(torch.device("cuda")) == {}
    assert other_bits(here, here) == other_bits({}, here) == other_bits({}, {}) == []
    threads, kernels = other_bits({"threads": 64, "cpu_kernels": "MINE"}, here)
    assert threads.startswith(f"{here['threads']} threads, where the run began with 64: the last bits may differ")
    assert threads.endswith("OMP_NUM_THREADS=64")
    assert "began with those for MINE" in kernels


def test_the_switch_for_determinism_is_set_and_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[CUBLAS] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS not in os.environ
    monkeypatch.setenv(CUBLAS, ":16:8")
    with deterministic(True):
        assert os.environ[CUBLAS] == ":16:8"
    assert os.environ[CUBLAS] == ":16:8"


def test_the_recipe_s_switch_is_on_while_a_run_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientllm.jobs import prune

    seen, real = [], prune.checkpoint

    def checkpoint(*arguments: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        real(*arguments)

    monkeypatch.setattr(prune, "checkpoint", checkpoint)
    recipe = world.write("determined", train={"tokens": 1024, "deterministic": True})
    assert call("prune", recipe) == 0
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_resumed_run_says_that_it_began_with_other_threads(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = world.write("threads", train={"tokens": 1024}), world.folder / "runs" / "threads"
    assert call("prune", recipe) == 0
    source = json.loads((folder / "source.json").read_text())
    assert source["threads"] == torch.get_num_threads()
    (folder / "summary.json").unlink()
    (folder / "source.json").write_text(json.dumps(source | {"threads": 64}))
    capsys.readouterr()
    assert call("prune", recipe) == 0
    said = capsys.readouterr().err
    assert said.count("where the run began with 64: the last bits may differ") == 1
    assert "CPU kernels" not in said
