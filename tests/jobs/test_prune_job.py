"""The main job as a user runs it: two commands, a run folder, interruptions, misfortunes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import World, tiny_model
from efficientllm.checkpoint.store import checkpoints
from efficientllm.reporting.journal import read_journal
from processes import call, codes, pid_of, run_and_die, start, start_command, steps_done, wait_for

RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("efficientllm") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the model learns to", return_tensors="pt").input_ids
logits = model(ids).logits
text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
print(json.dumps({"logits": logits[0, -1].tolist(), "text": text, "tied": tied,
                  "parameters": sum(p.numel() for p in model.parameters())}))
"""


def test_run_folder_says_what_happened(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    metrics = read_journal(finished / "metrics.jsonl")
    events = read_journal(finished / "events.jsonl")
    compactions = read_journal(finished / "compactions.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 25))
    source, result = summary["source"], summary["result"]
    assert 0.9 * 0.5 * source["parameters"] < result["parameters"] <= 0.5 * source["parameters"]
    assert result["validation_loss"] < source["validation_loss"]
    assert (summary["events"], summary["compactions"]) == (len(events), len(compactions))
    assert metrics[-1]["allocated_parameters"] == metrics[-1]["live_parameters"] == result["parameters"]
    assert events[-1]["parameters_after"] == result["parameters"]
    assert events[-1]["widths"] == compactions[-1]["after"] == result["widths"]
    assert compactions[0]["allocated_before"] == source["parameters"]
    sizes = [record["live_parameters"] for record in metrics]
    assert sizes == sorted(sizes, reverse=True)
    spent = [0, *(record["flops"] for record in metrics)]
    steps = [after - before for before, after in pairwise(spent)]
    assert summary["flops"] == spent[-1] == sum(summary["flops_by_part"].values())
    assert metrics[-1]["flops_by_part"] == summary["flops_by_part"]
    assert all(summary["flops_by_part"][part] > 0 for part in ("steps", "looks", "correction"))
    assert steps[0] > steps[-1] == steps[-2] > 0  # compact, and no longer measured
    assert all(event["saliency"] > 0 and event["damage_per_parameter"] > 0 for event in events)
    assert {record["step"] for record in metrics if "validation_loss" in record} == {8, 16, 24}
    assert (finished / "run.png").stat().st_size > 10_000
    assert "AutoModelForCausalLM" in (finished / "model" / "README.md").read_text()
    assert len(checkpoints(finished / "checkpoints")) == 2


def test_result_loads_with_transformers_alone(finished: Path) -> None:
    """In a fresh process: the trained weights bit for bit, the same logits, text, tied embeddings."""
    out = subprocess.run(
        [sys.executable, "-c", RELOAD, str(finished / "model")], capture_output=True, text=True, check=True
    )
    answer = json.loads(out.stdout.strip().splitlines()[-1])
    tokenizer = json.loads((finished / "model" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 and 5 know
    summary = json.loads((finished / "summary.json").read_text())
    assert answer["parameters"] == summary["result"]["parameters"]
    assert answer["tied"]
    assert answer["text"]
    trained = load_file(checkpoints(finished / "checkpoints")[-1] / "weights.safetensors")
    exported = load_file(finished / "model" / "model.safetensors")
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name], exported[name]) for name in trained)


def test_finished_run_is_not_repeated(world: World, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert call("prune", world.folder / "calm.yaml") == 0
    captured = capsys.readouterr()
    assert "is finished" in captured.err
    assert captured.out.strip() == str(finished / "model")
    assert (finished / "metrics.jsonl").read_bytes() == before


def same_weights(one: Path, other: Path) -> bool:
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )


def test_killed_and_resumed_is_bitwise_the_same(world: World, finished: Path) -> None:
    """SIGKILL before the first checkpoint, between checkpoints, and while one is being written."""
    recipe = world.write("killed")
    folder, log = world.folder / "runs" / "killed", recipe.with_suffix(".log")
    moments = [
        ("efficientllm.training.loop.update", 4),
        ("efficientllm.training.loop.update", 11),
        ("efficientllm.checkpoint.store.save_file", 2),
    ]
    for function, number in moments:
        process = start(log, run_and_die, (["prune", str(recipe)], function, number))
        assert codes([process]) == [-signal.SIGKILL], log.read_text()[-3000:]
    assert steps_done(folder) == 16
    assert list((folder / "checkpoints").glob(".partial-step-00000016*"))
    assert call("prune", recipe) == 0
    assert same_weights(folder, finished)
    timing = ("seconds", "tokens_per_second", "peak_memory_bytes")
    for name in ("metrics", "events", "compactions"):
        records = [read_journal(each / f"{name}.jsonl") for each in (folder, finished)]
        for record in records[0] + records[1]:
            for key in timing:
                record.pop(key, None)
        assert records[0] == records[1], name


def test_interrupted_run_is_saved_and_goes_on(world: World, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder is its own until then."""
    recipe = world.write("interrupted")
    folder, log = world.folder / "runs" / "interrupted", recipe.with_suffix(".log")
    process = start_command(log, "prune", recipe)
    wait_for(lambda: steps_done(folder) >= 1, process.is_alive, log)
    os.kill(pid_of(process), signal.SIGSTOP)  # it holds its folder, however slow this process is
    assert call("prune", recipe) == 2
    assert "another process is working on" in capsys.readouterr().err
    for number in (signal.SIGTERM, signal.SIGCONT):
        os.kill(pid_of(process), number)
    assert codes([process]) == [128 + signal.SIGTERM]
    assert "the same command goes on from there" in log.read_text()
    saved = checkpoints(folder / "checkpoints")
    assert saved
    assert call("prune", recipe) == 0
    assert same_weights(folder, finished)


def test_plain_training_and_the_scratch_control(world: World, finished: Path) -> None:
    recipe = world.recipe("scratch", source=str(finished / "model"), init="random", train={"tokens": 8 * 256})
    del recipe["prune"]
    path = world.folder / "scratch.yaml"
    path.write_text(json.dumps(recipe))
    assert call("train", path) == 0
    folder = world.folder / "runs" / "scratch"
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["source"]["parameters"] == json.loads((finished / "summary.json").read_text())["result"]["parameters"]
    )
    assert summary["events"] == 0
    assert summary["result"]["validation_loss"] < summary["source"]["validation_loss"]


def test_the_paper_s_cadence(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One event every second batch; the target is not reached in time, and the run says so, beforehand too, and exports
    what is live. Where a checkpoint is overdue at every step, every step leaves one."""
    monkeypatch.setattr("efficientllm.jobs.prune.AT_LATEST", -1.0)
    path = world.write(
        "every",
        prune={"target": "50%", "every": 2, "start": 0, "floors": {"intermediate": 8}, "end": None},
        run={"checkpoint_every": "100%", "keep": 30},
    )
    assert call("prune", path) == 0
    folder = world.folder / "runs" / "every"
    events = read_journal(folder / "events.jsonl")
    assert [event["step"] for event in events] == list(range(2, 25, 2))[: len(events)]
    said = capsys.readouterr().err
    assert "prune.every 2 leaves room for 12 events" in said
    assert "train longer, or lower prune.every" in said
    assert json.loads((folder / "summary.json").read_text())["target_reached"] is False
    assert len(checkpoints(folder / "checkpoints")) == 24


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prune": {"target": "90B"}}, "is not below the source's"),
        ({"prune": {"target": 200}}, "aim higher"),
        ({"prune": {"saliency": "tailor-element"}}, "did you mean 'taylor-element'"),
        ({"prune": {"target": {"hidden": 400}}}, "above the source's 40"),
        ({"source": "./nowhere/at/all"}, "neither a folder nor a hub id"),
        ({"data": {"train": "missing-*.jsonl"}}, "missing-"),
        ({"data": {"sequence_length": 128}}, "more than the 64 positions"),
        ({"train": {"device": "cuda:7"}}, "not available here"),
        ({"train": {"lr": 1e30, "grad_clip": 0}}, "diverged"),
    ],
)
def test_bad_input_gets_one_sentence(
    world: World, sections: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = world.write("bad", **sections)  # type: ignore[arg-type]
    try:
        assert call("prune", recipe) == 2
    finally:
        shutil.rmtree(world.folder / "runs" / "bad", ignore_errors=True)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_bad_batch_is_skipped_and_a_diverged_run_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradient turns to NaN at chosen steps; what follows is as if their batches had been read and no more."""
    from efficientllm.training.looks import Use
    from efficientllm.training.passes import Passes

    real, calls, bad = Passes.backward, [0], {3, 4, 9}

    def poisoned(passes: Passes, use: Use, *more: object) -> torch.Tensor:
        calls[0] += use == "step"
        loss = real(passes, use, *more)  # type: ignore[arg-type]
        return loss * float("nan") if use == "step" and calls[0] in bad else loss

    monkeypatch.setattr(Passes, "backward", poisoned)
    path = world.write("poisoned", prune={"bound": 1.0})
    assert call("prune", path) == 0
    folder = world.folder / "runs" / "poisoned"
    lines = read_journal(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 9]
    assert lines[-1]["skipped_steps"] == json.loads((folder / "summary.json").read_text())["skipped_steps"] == 3
    assert not {event["step"] for event in read_journal(folder / "events.jsonl")} & {3, 4, 9}
    assert "step 3 was skipped" in capsys.readouterr().err
    calls[0], bad = 0, set(range(20, 100))
    assert call("prune", world.write("diverged", prune={"bound": 1.0})) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row" in said
    assert "the last good checkpoint is" in said
    assert "step-00000016" in said


def test_a_tokenizer_of_another_model_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path)  # 61 entries; the tokenizer has 256 bytes alone
    recipe = world.write("vocabulary", source=str(tmp_path), tokenizer=str(world.folder / "tokenizer"))  # type: ignore[arg-type]
    assert call("prune", recipe) == 2
    assert "do not belong together" in capsys.readouterr().err


def test_text_that_changed_is_refused_on_resume(
    world: World, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "runs" / "changed"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    (folder / "config.yaml").unlink()
    train = world.folder / "train.jsonl"
    text = train.read_text()
    try:
        train.write_text(text + json.dumps({"text": "one more document about heads"}) + "\n")
        assert call("prune", world.write("changed")) == 2
        assert "is not the text that run folder" in capsys.readouterr().err
    finally:
        train.write_text(text)


def test_generation_settings_of_the_source_survive(world: World, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(world.folder / "source", source)
    settings = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings))
    recipe = world.write("generation", source=str(source), train={"tokens": 1024})  # type: ignore[arg-type]
    assert call("prune", recipe, "prune.end=100%") == 0
    saved = json.loads((world.folder / "runs" / "generation" / "model" / "generation_config.json").read_text())
    assert {key: saved[key] for key in settings} == settings


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


def test_damaged_checkpoint_is_named_and_the_one_before_serves(
    world: World, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "runs" / "damaged"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    (folder / "config.yaml").unlink()
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


@pytest.mark.slow
def test_help_starts_without_loading_torch() -> None:
    code = "import sys, efficientllm.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
