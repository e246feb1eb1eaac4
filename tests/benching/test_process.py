"""Models in turn, each in a process of its own: what becomes of one that dies, or whose memory runs out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from conftest import tiny_config
from efficientllm.benching import process, table
from efficientllm.benching.settings import Settings
from efficientllm.benching.subjects import BenchModel
from efficientllm.errors import UsageError
from efficientllm.models.space import widths_of
from processes import start, wait_for


def test_models_take_turns_and_warm_ups_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    @contextmanager
    def recorded(name: str, load: object) -> Iterator[Callable[[int], Any]]:
        def run(batch: int) -> Any:
            asked.append((name, batch))
            return {"prefill_seconds": float(len(asked))}, {"peak": len(asked)}

        yield run

    monkeypatch.setattr(process, "process_of", recorded)
    settings = Settings(8, 4, (1, 4), 2, "transformers", "cpu", "float32", 1)
    found = process.measure_all([BenchModel(name, name, {}) for name in "ab"], settings)
    assert asked == [
        ("b", 1), ("a", 1), ("b", 4), ("a", 4),  # not counted
        ("a", 1), ("b", 1), ("a", 4), ("b", 4),
        ("b", 1), ("a", 1), ("b", 4), ("a", 4),
    ]  # fmt: skip
    assert [each["prefill_seconds"] for each in found[0]["samples"][1]] == [5.0, 10.0]
    assert [each["prefill_seconds"] for each in found[1]["samples"][4]] == [8.0, 11.0]
    assert [each["memory"]["peak"] for each in found] == [12, 11]  # of the last run


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((os.kill, signal.SIGKILL), ", which the system does to it when memory runs out; see what it printed above"),
        ((os.kill, signal.SIGABRT), " by SIGABRT; see what it printed above"),
        ((os._exit, 3), " with exit code 3; see what it printed above"),
    ],
)
def test_a_process_that_dies_is_one_sentence(
    how: tuple[Callable[..., Any], int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, argument = how
    if argument != signal.SIGKILL:
        monkeypatch.setattr(process, "get_context", lambda method: get_context("forkserver"))  # imports nothing anew
    with process.process_of("mine", partial(dying, act, argument)) as run:
        pid = run(0)
        for _ in ("while it measures", "while another one did"):
            with pytest.raises(UsageError, match=f"^the process that measured mine has died{said}$"):
                run(1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def dying(act: Callable[..., Any], argument: int) -> Callable[[int], Any]:
    """What gives its process's number when it is asked for 0, and dies when it is asked for more."""
    own = [os.getpid()] if act is os.kill else []
    return lambda batch: act(*own, argument) if batch else os.getpid()


def hold(pid_file: Path) -> Any:
    FileLock(f"{pid_file}.lock").acquire()
    pid_file.write_text(str(os.getpid()))
    time.sleep(900)


def ask(pid_file: Path) -> None:
    with process.process_of("mine", partial(hold, pid_file)):
        raise AssertionError("it never ends loading")


@pytest.mark.slow
def test_the_process_ends_when_the_one_that_asks_is_killed(tmp_path: Path) -> None:
    log, pid_file = tmp_path / "log", tmp_path / "pid"
    asking = start(log, ask, pid_file, daemon=False)
    wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()), asking.is_alive, log)
    asking.kill()
    try:
        FileLock(tmp_path / "pid.lock").acquire(timeout=60)  # which the end of a process releases
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("when", ["loading", "loading, wrapped", "measuring"])
def test_memory_that_runs_out_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, when: str) -> None:
    def fail(*_: object) -> Any:
        if when == "loading, wrapped":
            raise UsageError("cannot load the weights") from error
        raise error

    load = fail if when.startswith("loading") else lambda source, settings: None
    monkeypatch.setattr(process, "_loader", lambda settings: load)
    monkeypatch.setattr(process, "measure", fail)
    with pytest.raises(UsageError, match=r"mine .*does not fit in the memory of the device; (lower|choose)"):
        process.loaded("mine", Settings(8, 4, (1,), 1, "transformers", "cpu", "float32", 1))(1)


def test_memory_that_runs_out_under_a_table_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(table, "_turn", fail)
    config, settings = tiny_config("llama-gqa"), Settings(8, 4, (1,), 1, "transformers", "cpu", "float32", 1)
    with pytest.raises(UsageError, match="two models of that size with 12 tokens do not fit in the memory"):
        table.latencies(config, [widths_of(config)], settings)
