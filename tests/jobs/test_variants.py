"""The main job in its variants: precision, compilation, families, mixtures; and how it is stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import World, tiny_model
from efficientllm.checkpoint.store import checkpoints
from efficientllm.jobs import prune as prune_job
from efficientllm.jobs.samples import write_samples
from efficientllm.models.loading import load_tokenizer
from efficientllm.reporting.journal import read_journal
from efficientllm.training import planning
from processes import call


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_journal(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("name", "train", "tolerance"),
    [
        ("recomputed", {"gradient_checkpointing": True, "micro_batch": 2, "loss": "chunked"}, 1e-4),
        ("bf16", {"precision": "bf16"}, 0.05),
    ],
)
def test_the_same_run_by_other_means(
    world: World, finished: Path, name: str, train: dict[str, Any], tolerance: float
) -> None:
    """First the same loss; at the end, after compactions, no worse: other last bits may lead to another shape."""
    assert call("prune", world.write(name, train=train)) == 0
    folder = world.folder / "runs" / name
    assert losses(folder)[0] == pytest.approx(losses(finished)[0], abs=tolerance)
    assert read_journal(folder / "compactions.jsonl")
    assert losses(folder)[-1] < losses(finished)[-1] + 0.2


def test_a_compiled_run_starts_and_is_compiled_again_after_a_compaction(
    world: World, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, differentiated and guarded as ever; only the C++ of inductor takes minutes and is left to its name."""
    backend = os.environ.get("COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(planning, "COMPACT_AT", 1.0)
    prune = {"target": "90%", "types": ["ffn"], "end": "50%"}
    recipe = world.write("compile", train={"compile": True, "tokens": 3 * 256}, prune=prune)
    assert call("prune", recipe) == 0
    folder = world.folder / "runs" / "compile"
    assert losses(folder)[0] == pytest.approx(losses(finished)[0], abs=1e-3)
    (compaction,) = read_journal(folder / "compactions.jsonl")
    assert compaction["step"] < len(losses(folder)) == 3


@pytest.mark.parametrize("name", ["qwen2-gqa-tied", "qwen3-gqa", "llama-mha-tied"])
def test_other_families_through_the_whole_job(world: World, name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    shutil.copytree(world.folder / "source", source)
    tiny_model(name, vocab_size=300).save_pretrained(source)
    recipe = world.write(name, source=str(source), train={"tokens": 8 * 256}, prune={"correction": "none"})  # type: ignore[arg-type]
    assert call("prune", recipe) == 0
    folder = world.folder / "runs" / name
    summary = json.loads((folder / "summary.json").read_text())
    exported = load_file(folder / "model" / "model.safetensors")
    assert sum(weight.numel() for weight in exported.values()) == summary["result"]["parameters"]
    assert ("lm_head.weight" in exported) == (not name.endswith("tied"))
    assert summary["result"]["validation_loss"] < summary["source"]["validation_loss"]


def write_talks(world: World) -> Path:
    """Conversations, and a tokenizer with a template for them. Returns the file."""
    tokenizer = load_tokenizer(str(world.folder / "source"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(world.folder / "chats")
    file, lines = world.folder / "chats" / "talks.jsonl", []
    for number in range(30):
        turns = [{"role": "user", "content": f"write {number}"}, {"role": "assistant", "content": "short words"}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    file.write_text("".join(lines))
    return file


@pytest.mark.parametrize("chats", [False, True])
def test_a_weighted_mixture_goes_on_with_the_same_batches(
    world: World, chats: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of texts; of texts and conversations, attention within each and a teacher of them."""
    other = write_talks(world) if chats else world.folder / "validation.jsonl"
    train = [{"path": str(world.folder / "train.jsonl"), "weight": 1.0}, {"path": str(other), "weight": 1.0}]
    name, sections = "mixed", dict[str, Any]()
    if chats:
        name, sections = (
            "mixed-chats",
            {"tokenizer": str(world.folder / "chats"), "distill": {"weight": 0.3, "hidden": 1.0}},
        )
        sections["data"] = {
            "validation": [str(world.folder / "validation.jsonl"), str(other)],
            "within_documents": True,
        }
    sections["data"] = sections.get("data", {}) | {"train": train}
    recipe = world.write(name, train={"tokens": 12 * 256}, **sections)
    folder = world.folder / "runs" / name
    assert call("prune", recipe) == 0
    whole = losses(folder)
    (folder / "summary.json").unlink()
    for checkpoint in checkpoints(folder / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    assert call("prune", recipe) == 0
    assert "will be read" in capsys.readouterr().err
    assert losses(folder) == whole
    config = folder / "config.yaml"  # as an earlier version may have pruned by
    config.write_text(config.read_text().replace("selection: raw", "selection: calibrated"))
    write_samples(folder, print)
    samples = json.loads((folder / "samples.json").read_text())
    end = load_tokenizer(str(world.folder / "source")).eos_token
    # The template's last space is one token with the answer's first word, and so none of the assistant's.
    asked = [re.fullmatch(rf"user: write \d+{re.escape(end)}assistant: short", each["prompt"]) for each in samples]
    assert len(samples) == 3
    assert all(asked) == chats


def test_sparse_log_covers_every_token_and_second(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_job, "LINES", 3)
    run = {"validate_every": "100%"}
    assert call("prune", world.write("sparse", run=run, train={"tokens": 12 * 256}, prune={"correction": "none"})) == 0
    records = read_journal(world.folder / "runs" / "sparse" / "metrics.jsonl")
    steps = [record["step"] for record in records]
    assert {4, 8, 12} <= set(steps)
    assert len(steps) < 12
    counted = [round(record["tokens_per_second"] * record["seconds"]) for record in records]
    assert sum(counted) == records[-1]["tokens"] == 12 * 256


def interrupt(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_the_first_step_and_during_validations(
    world: World, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run, stopped three times: what was under way is saved first, and in the end nothing is different."""
    from efficientllm.jobs import begin, validate

    real, done = validate.validation_loss, []
    recipe, folder = world.write("stopped"), world.folder / "runs" / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(begin, "load_model", interrupt)
        assert call("prune", recipe) == 130
    assert not checkpoints(folder / "checkpoints")

    def validation_loss(*args: Any, tick: Any, **kwargs: Any) -> float:
        done.append(1)
        if len(done) in (2, 4):  # the first is of the source, the second after step 8, the fourth after step 24
            interrupt()
        return real(*args, tick=tick, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(validate, "validation_loss", validation_loss)
        for step in (8, 24):
            capsys.readouterr()
            assert call("prune", recipe) == 130
            assert "stopped and saved" in capsys.readouterr().err
            assert checkpoints(folder / "checkpoints")[-1].name == f"step-{step:08d}"
    assert call("prune", recipe) == 0
    assert losses(folder) == losses(finished)
    results = [json.loads((each / "summary.json").read_text())["result"] for each in (folder, finished)]
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
