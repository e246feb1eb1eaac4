"""The command: a whole measurement in processes of their own, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from conftest import World, need_llamacpp, tiny_model
from efficientllm.cli import main
from efficientllm.reporting.report_page import page as report_page
from efficientllm.reporting.run_record import read_run

SHORT = ("--prompt", "9", "--generate", "4", "--threads", "1", "--device", "cpu")


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


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
    ("argv", "sentence"),
    [
        (["--batch", "0"], "--batch 0 is not a list of positive numbers"),
        (["--batch", "1,x"], "--batch 1,x is not a list"),
        (["--generate", "1"], "Invalid value for '--generate'"),
        (["--prompt", "0"], "Invalid value for '--prompt'"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--prompt", "61"], "takes 64 positions at most; --prompt 61 and --generate 4 make 65"),
        (["--dtype", "int3"], "--dtype int3 cannot be measured here; choose auto, float32, bfloat16, float16"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be measured here; choose auto, cpu"),
        (["--device", "mps"], "--device mps cannot be measured here"),
        (["--backend", "onnx"], "--backend onnx cannot be measured here; choose transformers, llamacpp"),
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
        (["--dtype", "float32"], "--dtype float32 cannot be measured here; choose auto, f32"),
        (["--device", "cuda"], "--device cuda cannot be measured here; choose auto, cpu"),
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
