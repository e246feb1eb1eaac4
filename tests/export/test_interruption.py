"""Ctrl-C and SIGTERM in the middle of an export or a measurement: nothing half-written, and a true sentence."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from efficientllm.benching import process
from efficientllm.cli import main
from efficientllm.export.weights import Weights


def stopped(argv: list[str | Path]) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_an_export_that_is_stopped_leaves_nothing(
    make_model: Any,
    tmp_path: Path,
    to: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    folder, _ = make_model("llama-gqa")
    read = Weights.read

    def interrupted(weights: Weights, name: str) -> Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            os.kill(os.getpid(), number)
        return read(weights, name)

    monkeypatch.setattr(Weights, "read", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert stopped(["export", folder, "--to", to, "--out", tmp_path / "x" / "m"]) == 128 + number
    assert list((tmp_path / "x").iterdir()) == []
    captured = capsys.readouterr()
    assert "stopped; nothing half-written is left" in captured.err
    assert captured.out == ""
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_measurement_that_is_stopped_leaves_nothing(
    make_model: Any,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = make_model("llama-gqa")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(process, "measure_all", lambda *_: os.kill(os.getpid(), number))
    argv = ["bench", folder, "--device", "cpu", "--prompt", "9", "--generate", "4", "--json", tmp_path / "bench.json"]
    assert stopped(argv) == 128 + number
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "bench.json").exists()
    assert "nothing of this measurement is kept" in capsys.readouterr().err
