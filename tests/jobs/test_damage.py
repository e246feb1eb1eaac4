"""What a run finds changed, damaged or left by another version when it goes on, and a disk that is full."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import World
from efficientllm.checkpoint.store import checkpoints
from efficientllm.reporting.journal import read_journal
from processes import call, same_weights


def reopened(run: Path, name: str) -> Path:
    """A copy of a finished run that has lost its end."""
    folder = run.parent / name
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    return folder


def test_text_that_changed_is_refused_on_resume(
    world: World, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reopened(finished, "changed")
    train = world.folder / "train.jsonl"
    text = train.read_text()
    try:
        train.write_text(text + json.dumps({"text": "one more document about heads"}) + "\n")
        assert call("prune", world.write("changed")) == 2
        assert "is not the text that run folder" in capsys.readouterr().err
    finally:
        train.write_text(text)


def test_another_recipe_on_the_same_folder_is_refused(
    world: World, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = world.write("calm", train={"lr": 5e-3})
    try:
        assert call("prune", recipe) == 2
        assert "train.lr=0.01, not 0.005" in capsys.readouterr().err
        assert call("prune", world.write("calm", run={"keep": 5})) == 0
    finally:
        world.write("calm")


def test_micro_batch_may_change_on_resume_but_not_the_rows_of_validation(
    world: World, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reopened(finished, "freer")
    shutil.rmtree(checkpoints(folder / "checkpoints")[-1])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["prune"]["selection"]  # as an older version, which had no such key, would have left it
    config["prune"]["ema"] = 0.5  # or one that had a key which has gone since
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    recipe = world.write("freer")
    assert call("prune", recipe, "run.validation_tokens=64") == 2
    assert "run.validation_tokens=auto, not 64" in capsys.readouterr().err
    assert call("prune", recipe, "train.micro_batch=2") == 0
    one, other = (read_journal(run / "metrics.jsonl")[-1]["loss"] for run in (folder, finished))
    assert one == pytest.approx(other, abs=1e-2)


@pytest.mark.parametrize("name", ["source.json", "summary.json", "config.yaml", "metrics.jsonl"])
def test_a_damaged_record_is_named(world: World, finished: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world.folder / "runs" / "records"
    shutil.copytree(finished, folder)
    try:
        if name != "summary.json":
            (folder / "summary.json").unlink()
        (folder / name).write_text("{half\nof a record")
        assert call("prune", world.write("records")) == 2
    finally:
        shutil.rmtree(folder)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last


def test_damaged_checkpoint_is_named_and_the_one_before_serves(
    world: World, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reopened(finished, "damaged")
    shutil.rmtree(folder / "model")
    newest, older = checkpoints(folder / "checkpoints")[::-1]
    weights = newest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    recipe = world.write("damaged")
    assert call("prune", recipe) == 2
    assert f"{newest} is damaged" in capsys.readouterr().err
    shutil.rmtree(newest)
    manifest = json.loads((older / "manifest.json").read_text())
    assert next(iter(manifest)) == "widths"
    assert call("prune", recipe) == 0
    assert same_weights(folder, finished)
    shutil.rmtree(newest)
    (folder / "summary.json").unlink()
    capsys.readouterr()
    (older / "manifest.json").write_text(json.dumps(manifest | {"format": 99, "efficientllm": "9.0"}))
    assert call("prune", recipe) == 2
    assert "was written by efficientllm 9.0, which is newer" in capsys.readouterr().err
    earlier = manifest | {"pruner": manifest["pruner"] | {"saliency_scale": 1.0}}
    (older / "manifest.json").write_text(json.dumps(earlier))
    assert call("prune", recipe) == 0
    assert f"{older} is of an earlier version, whose scores are in another unit" in capsys.readouterr().err
    for newer in set(checkpoints(folder / "checkpoints")) - {older}:
        shutil.rmtree(newer)
    (folder / "summary.json").unlink()
    for missing in ("files", "config", "step"):
        less = {key: value for key, value in manifest.items() if key != missing}
        (older / "manifest.json").write_text(json.dumps(less))
        assert call("prune", recipe) == 2
        assert f"{older} is damaged (its manifest.json cannot be read)" in capsys.readouterr().err


def test_a_run_that_has_measured_losses_is_not_gone_on_with_while_it_prunes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of an earlier version: refused as it is found, unless nothing was measured yet; whose bill is kept.
    Once its pruning is over it is trained on in another one: here the recipe would hide what it was pruned by."""
    recipe = world.write(
        "measured",
        train={"tokens": 8 * 256},
        prune={"end": "90%", "saliency": "flap", "correction": "none"},
        run={"checkpoint_every": 3 * 256, "keep": 9},
    )
    folder = world.folder / "runs" / "measured"
    assert call("prune", recipe) == 0
    assert "scores of flap compare its types by scale only" in " ".join(capsys.readouterr().err.split())
    first, *later = checkpoints(folder / "checkpoints")
    weights, summary = (
        load_file(folder / "model" / "model.safetensors"),
        json.loads((folder / "summary.json").read_text()),
    )
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    for each in later:
        shutil.rmtree(each)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("selection: raw", "selection: auto"))

    def as_found(measured: dict[str, float], checkpoint: Path = first, *more: str) -> int:
        file = checkpoint / "manifest.json"
        facts = {"calibration": {"smoothing": 0.5, "units": {}, "measured": measured, "predicted": measured}}
        found = json.loads(file.read_text())
        found["pruner"] |= facts
        found["flops"]["calibration"] = 1000
        file.write_text(json.dumps(found))
        return call("prune", recipe, *more)

    journal = (folder / "metrics.jsonl").read_text()
    assert as_found({"ffn": 0.1}) == 2
    assert "the pruning types were compared by measured losses" in " ".join(capsys.readouterr().err.split())
    assert (folder / "metrics.jsonl").read_text() == journal
    assert as_found({}) == 0
    again = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert json.loads((folder / "summary.json").read_text())["flops"] == summary["flops"] + 1000
    config.write_text(config.read_text().replace("selection: raw", "selection: calibrated"))
    capsys.readouterr()
    assert call("prune", recipe) == 2
    last = checkpoints(folder / "checkpoints")[-1]
    assert f"choose another run.dir, with resume={last} to go on from there" in capsys.readouterr().err
    assert as_found({"ffn": 0.1}, last, f"resume={last}", f"run.dir={folder}-on", "train.tokens=2304") == 0
    assert load_file(Path(f"{folder}-on") / "model" / "model.safetensors").keys() == weights.keys()


def test_full_disk_leaves_the_previous_checkpoint_whole(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    from efficientllm.checkpoint import store

    real, calls = store.save_file, []

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:  # the second checkpoint's second file
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(store, "save_file", save_file)
    recipe = world.write("full")
    assert call("prune", recipe) == 2
    assert "No space left on device" in capsys.readouterr().err
    folder = world.folder / "runs" / "full" / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000008"]
    monkeypatch.setattr(store, "save_file", real)
    assert call("prune", recipe) == 0
    assert same_weights(world.folder / "runs" / "full", finished)
