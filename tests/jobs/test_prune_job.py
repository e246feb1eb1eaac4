"""The main job as a user runs it: two commands, a run folder, interruptions, misfortunes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import World
from efficientllm.checkpoint.store import checkpoints
from efficientllm.reporting.journal import read_journal
from processes import call, codes, pid_of, run_and_die, same_weights, start, start_command, steps_done, wait_for

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
    changes = {"source": str(finished / "model"), "init": "random", "prune": None}
    assert call("train", world.write("scratch", train={"tokens": 8 * 256}, **changes)) == 0
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


@pytest.mark.slow
def test_help_starts_without_loading_torch() -> None:
    code = "import sys, efficientllm.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
