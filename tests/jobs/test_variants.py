"""The main job in its variants: precision, compilation, families, mixtures; and how it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from conftest import World, tiny_model
from efficientllm.checkpoint.store import checkpoints
from efficientllm.cli import main
from efficientllm.reporting.journal import read_journal


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_journal(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def calm(world: World) -> Path:
    assert call("prune", world.write("calm2")) == 0
    return world.folder / "runs" / "calm2"


@pytest.mark.parametrize(
    ("train", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-4),
        ({"micro_batch": 2}, 1e-4),
        ({"loss": "chunked"}, 1e-4),
        ({"precision": "bf16"}, 0.05),
        pytest.param(
            {"compile": True}, 1e-3, marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
        ),
    ],
)
def test_the_same_run_by_other_means(world: World, calm: Path, train: dict[str, Any], tolerance: float) -> None:
    """First the same loss; at the end, after compactions, about the same quality."""
    name = next(iter(train))
    tokens = {"tokens": 8 * 256} if name == "compile" else {}
    assert call("prune", world.write(name, train=train | tokens)) == 0
    folder = world.folder / "runs" / name
    assert losses(folder)[0] == pytest.approx(losses(calm)[0], abs=tolerance)
    assert read_journal(folder / "compactions.jsonl")
    if name != "compile":
        assert losses(folder)[-1] == pytest.approx(losses(calm)[-1], abs=0.2)


@pytest.mark.parametrize("name", ["qwen2-gqa-tied", "qwen3-gqa", "llama-mha-tied"])
def test_other_families_through_the_whole_job(world: World, name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    shutil.copytree(world.folder / "source", source)
    tiny_model(name, vocab_size=300).save_pretrained(source)
    assert call("prune", world.write(name, source=str(source), train={"tokens": 12 * 256})) == 0  # type: ignore[arg-type]
    folder = world.folder / "runs" / name
    summary = json.loads((folder / "summary.json").read_text())
    exported = load_file(folder / "model" / "model.safetensors")
    assert sum(weight.numel() for weight in exported.values()) == summary["result"]["parameters"]
    assert ("lm_head.weight" in exported) == (not name.endswith("tied"))
    assert summary["result"]["validation_loss"] < summary["source"]["validation_loss"]


def test_a_weighted_mixture_goes_on_with_the_same_batches(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    train = [
        {"path": str(world.folder / "train.jsonl"), "weight": 1.0},
        {"path": str(world.folder / "validation.jsonl"), "weight": 1.0},
    ]
    for name in ("mixed", "mixed-stopped"):
        recipe = world.write(name, data={"train": train}, train={"tokens": 12 * 256})
        assert call("prune", recipe) == 0
    folders = [world.folder / "runs" / name for name in ("mixed", "mixed-stopped")]
    for path in (folders[1] / "summary.json", *checkpoints(folders[1] / "checkpoints")[1:]):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert call("prune", recipe) == 0
    assert "will be read" in capsys.readouterr().err
    assert losses(folders[0]) == losses(folders[1])


def test_sparse_log_covers_every_token_and_second(world: World) -> None:
    assert call("prune", world.write("sparse", run={"log_every": 5, "validate_every": "100%"})) == 0
    records = read_journal(world.folder / "runs" / "sparse" / "metrics.jsonl")
    steps = [record["step"] for record in records]
    assert {5, 10, 15, 20, 24} <= set(steps)
    assert len(steps) < 24
    counted = [round(record["tokens_per_second"] * record["seconds"]) for record in records]
    assert sum(counted) == records[-1]["tokens"] == 24 * 256


def interrupt(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_the_first_step(world: World, calm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientllm.jobs import begin

    recipe = world.write("early")
    with monkeypatch.context() as patch:
        patch.setattr(begin, "load_model", interrupt)
        assert call("prune", recipe) == 130
    assert call("prune", recipe) == 0
    assert losses(world.folder / "runs" / "early") == losses(calm)


@pytest.mark.parametrize("at", [8, 24])
def test_a_stop_during_validation_is_saved_first(
    world: World, calm: Path, monkeypatch: pytest.MonkeyPatch, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from efficientllm.jobs import validate

    real, done = validate.validation_loss, []

    def validation_loss(*args: Any, tick: Any, **kwargs: Any) -> float:
        done.append(1)
        if len(done) == 1 + at // 8:  # the source's is the first
            interrupt()
        return real(*args, tick=tick, **kwargs)

    recipe = world.write(f"validating-{at}")
    folder = world.folder / "runs" / f"validating-{at}"
    with monkeypatch.context() as patch:
        patch.setattr(validate, "validation_loss", validation_loss)
        assert call("prune", recipe) == 130
    assert "stopped and saved" in capsys.readouterr().err
    assert checkpoints(folder / "checkpoints")[-1].name == f"step-{at:08d}"
    assert call("prune", recipe) == 0
    results = [json.loads((each / "summary.json").read_text())["result"] for each in (folder, calm)]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]


def test_ctrl_c_during_export_still_finishes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientllm.jobs import finish

    real = finish.export_model

    def export_model(*args: Any, **kwargs: Any) -> None:
        interrupt()
        real(*args, **kwargs)

    monkeypatch.setattr(finish, "export_model", export_model)
    recipe = world.write("late", train={"tokens": 1024})
    assert call("prune", recipe, "prune.end=100%") == 130
    assert (world.folder / "runs" / "late" / "summary.json").is_file()


@pytest.mark.parametrize("name", ["source.json", "summary.json", "config.yaml", "metrics.jsonl"])
def test_a_damaged_record_is_named(world: World, calm: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world.folder / "runs" / "records"
    shutil.copytree(calm, folder)
    try:
        if name != "summary.json":
            (folder / "summary.json").unlink()
        if name != "config.yaml":
            (folder / "config.yaml").unlink()
        (folder / name).write_text("{half\nof a record")
        assert call("prune", world.write("records")) == 2
    finally:
        shutil.rmtree(folder)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last


def test_micro_batch_may_change_on_resume_but_not_the_rows_of_validation(
    world: World, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "runs" / "freer"
    shutil.copytree(calm, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(checkpoints(folder / "checkpoints")[-1])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["prune"]["calibration_tokens"]  # as an older version, which had no such key, would have left it
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    recipe = world.write("freer")
    assert call("prune", recipe, "run.validation_tokens=64") == 2
    assert "run.validation_tokens=auto, not 64" in capsys.readouterr().err
    assert call("prune", recipe, "train.micro_batch=2") == 0
    assert losses(folder)[-1] == pytest.approx(losses(calm)[-1], abs=1e-2)


def test_out_of_memory_names_the_mend(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from efficientllm.training import loop

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "accumulate_gradient", refuse)
    assert call("prune", world.write("memory")) == 2
    assert "lower train.micro_batch" in capsys.readouterr().err


def test_the_end_of_text_of_another_tokenizer_stops_generation(world: World, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(world.folder / "source", source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    path = world.write(
        "eos",
        source=str(source),  # type: ignore[arg-type]
        tokenizer=str(world.folder / "tokenizer"),  # type: ignore[arg-type]
        train={"tokens": 1024},
    )
    assert call("prune", path, "prune.end=100%") == 0
    saved = json.loads((world.folder / "runs" / "eos" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"][0] == 7
    assert len(saved["eos_token_id"]) == 2
