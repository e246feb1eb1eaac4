"""A run of two processes under torchrun: a rank dies, the system asks it to stop, a rank hangs, the recipe is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import World
from efficientllm.reporting.journal import read_journal

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def begin(recipe: Path, *overrides: str, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    options = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    log = recipe.with_suffix(".log").open("a")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [*TORCHRUN, *options, "-m", "efficientllm", "prune", str(recipe), *overrides]
    return subprocess.Popen(argv, stdout=log, stderr=log, text=True, env=environment)


def said(recipe: Path) -> str:
    return recipe.with_suffix(".log").read_text()


def process_of(torchrun: subprocess.Popen[str], rank: int) -> int:
    """The id of the process of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            mine = parent == torchrun.pid and f"RANK={rank}\0".encode() in (path / "environ").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if mine:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def wait_for(condition: Callable[[], bool], torchrun: subprocess.Popen[str], recipe: Path) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert torchrun.poll() is None, said(recipe)[-3000:]
        assert time.monotonic() < deadline, said(recipe)[-3000:]
        time.sleep(0.01)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


LONG = {"train": {"tokens": 48 * 256}, "prune": {"correction": "second-order", "ladder": ["75%"]}}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of ranks through /proc")
def test_a_killed_rank_and_a_preemption_change_no_bit(world: World) -> None:
    """Rank 1 is killed (torchrun restarts), then torchrun is asked to stop, then the same command is given again."""
    calm = world.write("two-calm", **LONG)
    assert begin(calm).wait() == 0, said(calm)[-3000:]
    recipe = world.write("two-disturbed", **LONG)
    folder = world.folder / "runs" / "two-disturbed"
    torchrun = begin(recipe, restarts=2)
    wait_for(lambda: steps_done(folder) >= 11, torchrun, recipe)
    os.kill(process_of(torchrun, 1), signal.SIGKILL)
    wait_for(lambda: "going on from" in said(recipe) and steps_done(folder) >= 20, torchrun, recipe)
    torchrun.send_signal(signal.SIGTERM)
    assert torchrun.wait() != 0
    assert "stopped and saved" in said(recipe)
    assert begin(recipe).wait() == 0, said(recipe)[-3000:]
    other = world.folder / "runs" / "two-calm"
    for file in ("model/model.safetensors", "ladder/*/model/model.safetensors"):
        (one,), (expected,) = folder.glob(file), other.glob(file)
        weights, wanted = load_file(one), load_file(expected)
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    events = read_journal(folder / "events.jsonl")
    assert events == read_journal(other / "events.jsonl")
    assert len(events) > 10
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["result"]["parameters"] <= 0.5 * summary["source"]["parameters"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of ranks through /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(world: World, rank: int) -> None:
    recipe = world.write(f"two-hung-{rank}", **LONG)
    torchrun = begin(recipe, "distributed.timeout=6")
    wait_for(lambda: steps_done(world.folder / "runs" / f"two-hung-{rank}") >= 3, torchrun, recipe)
    os.kill(process_of(torchrun, rank), signal.SIGSTOP)
    assert torchrun.wait(timeout=90) != 0
    errors = [line for line in said(recipe).splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: rank {rank} (")
    assert "has not answered for 6 seconds" in errors[0]


def test_bad_input_is_said_once(world: World) -> None:
    recipe = world.write("three-processes")
    assert begin(recipe, processes=3).wait() != 0
    errors = [line for line in said(recipe).splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "does not divide over 3 processes" in errors[0]
    assert said(recipe).count("exitcode  : 2 ") == 3
