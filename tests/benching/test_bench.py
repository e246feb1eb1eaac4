"""The command: order of the runs, a whole measurement in processes of their own, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from conftest import World, need_llamacpp, tiny_config, tiny_model
from efficientllm.benching import process, table
from efficientllm.benching.settings import Settings
from efficientllm.benching.subjects import BenchModel
from efficientllm.cli import main
from efficientllm.errors import UsageError
from efficientllm.models.space import widths_of
from efficientllm.reporting.report_page import page as report_page
from efficientllm.reporting.run_record import read_run
from processes import start, wait_for

SHORT = ("--prompt", "9", "--generate", "4", "--threads", "1", "--device", "cpu")


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


def test_models_take_turns_and_warm_ups_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    @contextmanager
    def recorded(name: str) -> Iterator[Callable[..., Any]]:
        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            if function.__name__ == "_load":
                return {}
            asked.append((name, *arguments))
            return {"prefill_seconds": float(len(asked))}, {"peak": len(asked)}

        yield call

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


def test_a_whole_measurement(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny model beside one of 32 MB: each process's memory is that of its own model."""
    large = tmp_path / "large"
    tiny_model("llama-gqa", hidden_size=256, intermediate_size=4096, head_dim=64).save_pretrained(large)
    small, out = tmp_path / "run", tmp_path / "bench.json"
    shutil.copytree(world.folder / "source", small / "model")
    source = {"path": "source", "parameters": 1, "widths": {}}
    rest = dict.fromkeys(("tokens", "events", "compactions", "seconds", "recipe"), 1)
    (small / "summary.json").write_text(json.dumps({"source": source, "result": source} | rest))
    assert call("bench", small, large, *SHORT, "--batch", "1,2", "--repeats", "2", "--json", out) == 0
    page = capsys.readouterr().out
    assert [line.split(" | ")[:2] for line in page.splitlines() if f"| {large} | 2" in line] == [[f"| {large}", "2"]]
    assert "transformers on cpu" in page
    result = json.loads(out.read_text())
    assert [model["model"] for model in result["models"]] == [str(small), str(large)]
    taken = [model["memory"]["peak"] - model["memory"]["before"] for model in result["models"]]
    weights = result["models"][1]["facts"]["weight_bytes"]
    assert weights > 25e6
    assert taken[0] < weights < taken[1]
    for model in result["models"]:
        for batch in ("1", "2"):
            found = model["batches"][batch]
            assert len(found["samples"]) == 2
            rates = [int(batch) * 9 / sample["prefill_seconds"] for sample in found["samples"]]
            assert found["prefill_tokens_per_second"]["low"] == pytest.approx(min(rates))
            rates = [int(batch) * 3 / sample["decode_seconds"] for sample in found["samples"]]
            assert found["decode_tokens_per_second"]["high"] == pytest.approx(max(rates))
    assert result["models"][0]["batches"]["1"]["decode_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert json.loads((small / "bench" / "transformers.json").read_text()) == result  # the run keeps it for its report
    assert [each["facts"]["type"] for each in result["models"]] == ["float32", "float32"]
    other = result | {"settings": result["settings"] | {"backend": "llamacpp"}}
    (small / "bench" / "llamacpp.json").write_text(json.dumps(other))
    (small / "bench" / "notes.json").write_text("[]")
    (small / "config.yaml").write_text("")
    record = read_run(small)
    assert record.bench == [other, result]
    shown = report_page([record], {})
    assert f"<td>{large}</td><td>2</td>" in shown
    assert "what it costs to run, in transformers" in shown
    assert "what it costs to run, in llamacpp" in shown


def test_a_whole_measurement_in_llamacpp(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder and a file, each in its process, to the results and the page."""
    need_llamacpp()
    from efficientllm.export.gguf import export_gguf
    from efficientllm.export.subject import subject_of

    folder, file, out = world.folder / "source", tmp_path / "m.gguf", tmp_path / "bench.json"
    export_gguf(subject_of(folder), "f32", file, say=lambda note: None)
    options = ("--backend", "llamacpp", *SHORT, "--batch", "1,2", "--repeats", "2", "--json", out)
    assert call("bench", folder, file, *options) == 0
    page = capsys.readouterr().out
    assert "llamacpp on cpu" in page
    assert f"| {folder} | f16 |" in page
    assert f"| {file} | f32 |" in page
    result = json.loads(out.read_text())
    assert "llama-cpp-python" in result["machine"]
    weights = [model["facts"]["weight_bytes"] for model in result["models"]]
    assert weights[0] < weights[1] < 2 * weights[0]  # norms are f32 in both
    for model in result["models"]:
        for batch in ("1", "2"):
            found = model["batches"][batch]
            assert len(found["samples"]) == 2
            assert 0 < found["decode_tokens_per_second"]["low"] <= found["decode_tokens_per_second"]["high"]
    assert result["models"][1]["batches"]["2"]["prefill_ratio"]["median"] > 0


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
    with process.process_of("mine") as call:
        pid = call(os.getpid)
        with pytest.raises(UsageError, match=f"^the process that measured mine has died{said}$"):
            call(act, *([pid] if act is os.kill else []), argument)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def hold(pid_file: Path) -> None:
    FileLock(f"{pid_file}.lock").acquire()
    pid_file.write_text(str(os.getpid()))
    time.sleep(900)


def ask(pid_file: Path) -> None:
    with process.process_of("mine") as call:
        call(hold, pid_file)


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
    monkeypatch.setattr(process, "loader", lambda settings: load)
    monkeypatch.setattr(process, "measure", fail)
    with pytest.raises(UsageError, match=r"mine .*does not fit in the memory of the device; (lower|choose)"):
        process.Measured("mine", Settings(8, 4, (1,), 1, "transformers", "cpu", "float32", 1)).run(1)


def test_memory_that_runs_out_under_a_table_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(table, "_turn", fail)
    config, settings = tiny_config("llama-gqa"), Settings(8, 4, (1,), 1, "transformers", "cpu", "float32", 1)
    with pytest.raises(UsageError, match="two models of that size with 12 tokens do not fit in the memory"):
        table.latencies(config, [widths_of(config)], settings)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--batch", "0"], "--batch 0 is not a list of positive numbers"),
        (["--batch", "1,x"], "--batch 1,x is not a list"),
        (["--generate", "1"], "Invalid value for '--generate'"),
        (["--prompt", "0"], "Invalid value for '--prompt'"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--prompt", "61"], "takes 64 positions at most; --prompt 61 and --generate 4 make 65"),
        (["--dtype", "int3"], "--dtype int3 is not known"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be measured here"),
        (["--device", "mps"], "--device mps cannot be measured"),
        (["--device", "abacus"], "--device abacus cannot be measured here"),
        (["--backend", "onnx"], "--backend onnx is not known; choose transformers or llamacpp"),
        (["--json", "."], "--json . is a folder"),
    ],
)
def test_bad_requests(world: World, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", world.folder / "source", *SHORT, *argv) == 2
    assert sentence in capsys.readouterr().err


def test_bad_models(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "model.gguf").write_text("no model")
    for model, sentence in (
        (tmp_path, "holds neither a run nor a model"),
        (tmp_path / "text.txt", "is a file"),
        (tmp_path / "model.gguf", "is no GGUF file"),
        (tmp_path / "not" / "there", "is neither a folder nor a hub id"),
    ):
        assert call("bench", world.folder / "source", model, *SHORT) == 2
        assert sentence in capsys.readouterr().err
    assert call("bench", *SHORT) == 2
    assert "Missing argument" in capsys.readouterr().err


def test_llamacpp_is_refused_where_it_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call("bench", world.folder / "source", "--backend", "llamacpp") == 2
    assert 'pip install "efficientllm[llamacpp]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--dtype", "q4_k_m"], "written by llama-quantize alone"),
        (["--dtype", "float32"], "is no GGUF type"),
        (["--device", "cuda"], "choose auto, cpu or gpu"),
        (["--prompt", "61"], "takes 64 positions at most"),
    ],
)
def test_bad_llamacpp_requests(
    world: World, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    options = ("--backend", "llamacpp", *SHORT)
    assert call("bench", world.folder / "source", *options, *argv) == 2
    assert sentence in capsys.readouterr().err
    (world.folder / "broken.gguf").write_text("no model")
    assert call("bench", world.folder / "broken.gguf", *options) == 2
    assert "is no GGUF file, by its first bytes" in capsys.readouterr().err
    assert call("bench", world.folder / "broken.gguf", *options, "--dtype", "f16") == 2
    assert "cannot change a .gguf file" in capsys.readouterr().err
