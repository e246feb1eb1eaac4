"""The end of a run: what is measured there stands, whatever becomes of pictures and pages."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import World
from efficientllm.config import Recipe
from efficientllm.distributed.ranks import ALONE
from efficientllm.jobs import finish, report
from efficientllm.jobs.run_folder import RunFolder
from efficientllm.models.loading import load_tokenizer
from processes import call


@pytest.mark.parametrize(("written", "read"), [(2.5, 2.5), (math.inf, math.nan), (math.nan, math.nan)])
def test_a_final_loss_that_is_not_finite_is_read_back_as_such(tmp_path: Path, written: float, read: float) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.append({"step": 5, "tokens": 5, "validation_loss": written})
    job: Any = SimpleNamespace(ranks=ALONE, folder=folder)
    state: Any = SimpleNamespace(step=5)
    assert finish.final_loss(job, state) == pytest.approx(read, nan_ok=True)


def test_a_picture_or_page_that_fails_leaves_a_finished_run(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no room for a legend")

    monkeypatch.setattr(finish, "plot_run", fail)
    monkeypatch.setattr(report, "write_report", fail)
    assert call("prune", world.write("undrawn", train={"tokens": 1024}, run={"report": True})) == 0
    folder = world.folder / "runs" / "undrawn"
    known = json.loads((folder / "source.json").read_text())["on_disk"]
    assert known == [str(world.folder / name) for name in ("source", "train.jsonl", "validation.jsonl")]
    said = capsys.readouterr().err
    assert (folder / "summary.json").is_file()
    assert not (folder / "run.png").exists()
    assert "run.png could not be drawn (no room for a legend)" in said
    assert "the report could not be written (no room for a legend)" in said


def test_the_peak_of_memory_is_that_of_all_processes_that_a_run_has_had(world: World) -> None:
    """A run that was killed after its widest steps has shown most of it to a process that is gone."""
    recipe, folder = world.write("peaked", train={"tokens": 1024}), world.folder / "runs" / "peaked"
    assert call("prune", recipe) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["peak_memory_bytes"] > 10e6 for line in lines)
    lines[0]["peak_memory_bytes"] = 1 << 60
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "summary.json").unlink()
    assert call("prune", recipe) == 0
    assert json.loads((folder / "summary.json").read_text())["peak_memory_bytes"] == 1 << 60


def test_generation_settings_of_the_source_survive(world: World, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(world.folder / "source", source)
    settings = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings))
    recipe = world.write("generation", source=str(source), train={"tokens": 1024})  # type: ignore[arg-type]
    assert call("prune", recipe, "prune.end=100%") == 0
    saved = json.loads((world.folder / "runs" / "generation" / "model" / "generation_config.json").read_text())
    assert {key: saved[key] for key in settings} == settings


def test_the_end_of_text_of_another_tokenizer_stops_generation(world: World, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(world.folder / "source", source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    tokenizer = str(world.folder / "tokenizer")
    job: Any = SimpleNamespace(
        recipe=Recipe.model_validate(world.recipe("eos", source=str(source), tokenizer=tokenizer)),  # type: ignore[arg-type]
        tokenizer=load_tokenizer(tokenizer),
        tokens=None,
    )
    settings = finish.generation_settings(job)
    assert settings is not None
    assert settings.eos_token_id == [7, job.tokenizer.eos_token_id]
