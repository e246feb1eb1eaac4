"""A run of several processes: a rank is killed, torchrun is asked to stop, a rank hangs, the recipe is wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from conftest import World
from efficientllm.cli import main
from efficientllm.distributed.watch import EXIT_HUNG
from efficientllm.reporting.journal import read_journal
from processes import codes, is_alive, pid_of, start, start_ranks, steps_done, wait_for

TORCHRUN = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", "2"]
TORCHRUN += ["--max-restarts", "2", "--monitor-interval", "0.2", "-m", "efficientllm"]


def torchrun(recipe: str) -> None:
    """`torchrun ... -m efficientllm prune RECIPE`, in whose place ranks are forked: four starts of Python fewer."""
    config, _, _ = config_from_args(get_args_parser().parse_args(TORCHRUN))
    config.start_method = "fork"
    elastic_launch(config, prune)(recipe)


def prune(recipe: str) -> None:
    try:
        main(["prune", recipe])
    except SystemExit as end:
        if end.code:  # the agent counts as done whoever returns
            raise


def ranks_of(recipe: Path, *overrides: str, processes: int = 2) -> list[BaseProcess]:
    return start_ranks(processes, log_of(recipe), main, ["prune", str(recipe), *overrides])


def log_of(recipe: Path) -> Path:
    return recipe.with_suffix(".log")


def said(recipe: Path) -> str:
    return log_of(recipe).read_text()


def last_rank(agent: BaseProcess) -> int:
    """The id of the process of rank 1, which starts last."""
    children = Path(f"/proc/{pid_of(agent)}/task/{pid_of(agent)}/children").read_text().split()
    return max(map(int, children))


# Twelve steps that prune, then many that are quick: a signal meets the run under way.
LONG = {
    "train": {"tokens": 48 * 256},
    "prune": {"correction": "second-order", "ladder": ["75%"], "bound": 0.2, "end": "25%"},
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of ranks through /proc")
def test_a_killed_rank_and_a_preemption_change_no_bit(world: World) -> None:
    """Rank 1 is killed (torchrun restarts), then torchrun is asked to stop, then the same command is given again."""
    calm, recipe = world.write("two-calm", **LONG), world.write("two-disturbed", **LONG)
    other, folder = (world.folder / "runs" / path.stem for path in (calm, recipe))
    assert codes(ranks_of(calm)) == [0, 0], said(calm)[-3000:]
    agent = start(log_of(recipe), torchrun, str(recipe), daemon=False)

    def wait(condition: Callable[[], bool]) -> None:
        wait_for(condition, agent.is_alive, log_of(recipe))

    wait(lambda: steps_done(folder) >= 9)
    os.kill(last_rank(agent), signal.SIGKILL)
    wait(lambda: "going on from" in said(recipe) and steps_done(folder) >= 14)
    agent.terminate()
    assert codes([agent]) != [0]
    assert "stopped and saved" in said(recipe)
    assert codes(ranks_of(recipe)) == [0, 0], said(recipe)[-3000:]
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


def test_a_rank_that_hangs_is_named(world: World) -> None:
    """Two runs side by side: in one rank 0 hangs, in the other rank 1. Either time the other one has the words."""
    recipes = [world.write(f"two-hung-{rank}", **LONG) for rank in (0, 1)]
    # So long that neither is over before it is stopped, however slow this process is.
    runs = [ranks_of(recipe, "distributed.timeout=15", "train.tokens=2M") for recipe in recipes]
    for rank, (recipe, processes) in enumerate(zip(recipes, runs, strict=True)):
        folder = world.folder / "runs" / recipe.stem
        wait_for(lambda: steps_done(folder) >= 3, lambda: all(map(is_alive, processes)), log_of(recipe))  # noqa: B023
        os.kill(pid_of(processes[rank]), signal.SIGSTOP)
    for rank, (recipe, processes) in enumerate(zip(recipes, runs, strict=True)):
        assert codes([processes[1 - rank]]) == [EXIT_HUNG], said(recipe)[-3000:]
        processes[rank].kill()
        errors = [line for line in said(recipe).splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert errors[0].startswith(f"error: rank {rank} (")
        assert "has not answered for 15 seconds" in errors[0]


def test_bad_input_is_said_once(world: World) -> None:
    recipe = world.write("three-processes")
    assert codes(ranks_of(recipe, processes=3)) == [2, 2, 2]
    errors = [line for line in said(recipe).splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "does not divide over 3 processes" in errors[0]
