"""The command line in this process, and processes that start at once: forked from one that has imported everything,
where a start of Python takes ten seconds of a slow core. What becomes of these is real: signals, codes, collectives."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from efficientllm.cli import main

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["efficientllm.jobs.prune", "efficientllm.models.space"])
STARTED: list[BaseProcess] = []


def call(*argv: str | Path) -> int:
    """The command line in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


@atexit.register
def end_what_is_left() -> None:
    """Of tests that failed: what has stopped, or waits for one that has, hears no other signal."""
    for process in STARTED:
        if process.is_alive():
            process.kill()


def _run(work: Callable[..., Any], argument: Any, environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    work(argument)


def start(
    log: Path, work: Callable[..., Any], argument: Any, *, daemon: bool = True, **environment: str
) -> BaseProcess:
    """A process that calls work(argument), both importable by name; what it prints is added to the log. One that is no
    daemon may start processes of its own."""
    process: BaseProcess = SERVER.Process(target=_run, args=(work, argument, environment, log), daemon=daemon)
    process.start()
    STARTED.append(process)
    return process


def start_command(log: Path, *argv: str | Path) -> BaseProcess:
    """A process with this command line of efficientllm."""
    return start(log, main, [str(each) for each in argv])


def run_and_die(argument: tuple[list[str], str, int]) -> None:
    """The command line, with SIGKILL to itself where a function (module.name) is called for the n-th time."""
    argv, function, number = argument
    name, attribute = function.rsplit(".", 1)
    module = importlib.import_module(name)
    real, calls = getattr(module, attribute), [0]

    def dying(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(module, attribute, dying)
    main(argv)


def start_ranks(world: int, log: Path, work: Callable[..., Any], argument: Any) -> list[BaseProcess]:
    """So many processes as torchrun starts them, with the store in this process as torchrun holds it in its own."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [start(log, work, argument, RANK=str(n), LOCAL_RANK=str(n), **shared) for n in range(world)]
    ranks[0].store = store  # type: ignore[attr-defined]  # lives as long as they do
    return ranks


def codes(processes: list[BaseProcess], seconds: float = 900.0) -> list[int | None]:
    """Exit codes once all have ended (None: one that has not, after so long)."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def pid_of(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


def is_alive(process: BaseProcess) -> bool:
    return process.is_alive()


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool], log: Path) -> None:
    """Until the condition holds. Fails, with the end of the log, once nothing is alive or after fifteen minutes."""
    deadline = time.monotonic() + 900
    while not condition():
        assert alive() or condition(), log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same_weights(one: Path, other: Path) -> bool:
    """Of two runs' results, bit for bit."""
    weights, expected = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
