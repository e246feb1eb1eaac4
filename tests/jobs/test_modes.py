"""What a recipe can switch on: criteria, post-training modes, pruning paths, the ladder and what goes on from it."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import World
from efficientllm.checkpoint.store import checkpoints
from efficientllm.jobs import probing
from efficientllm.jobs.probing import ProbeRequest
from efficientllm.models.flops import forward_flops, teacher_flops
from efficientllm.models.loading import load_config, load_tokenizer
from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA
from efficientllm.reporting.journal import read_journal
from processes import call


def records(world: World, name: str, kind: str) -> list[dict[str, Any]]:
    return read_journal(world.folder / "runs" / name / f"{kind}.jsonl")


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "reap"])  # of experts alone: test_experts.py
def test_every_criterion_prunes_all_types_in_the_loop(world: World, name: str) -> None:
    widths = {"hidden": 36, "heads": 1, "kv_heads": 1, "intermediate": 40}
    prune = {"saliency": name, "target": widths, "correction": "none", "end": "75%"}
    path = world.write(f"by-{name}", prune=prune, train={"tokens": 4 * 256})
    assert call("prune", path) == 0
    events = records(world, f"by-{name}", "events")
    assert {event["type"] for event in events} == {"attention", "attention_query", "ffn", "stem"}
    assert all(event["saliency"] >= 0 for event in events)
    assert len(events) == 1 + 1 + (52 - 40) + (40 - 36)


@pytest.mark.parametrize("correction", ["none", "second-order"])
@pytest.mark.parametrize("mode", ["one-shot", "iterative"])
def test_post_training_pruning_comes_before_the_first_step(world: World, mode: str, correction: str) -> None:
    """Its looks are on the bill, in FLOPs and look tokens; training has all of its own tokens."""
    name = f"{mode}-{correction}"
    idle = {"end": None} | ({"bound": None} if mode == "one-shot" else {})
    assert call("prune", world.write(name, prune={"mode": mode, "correction": correction} | idle)) == 0
    metrics, events = records(world, name, "metrics"), records(world, name, "events")
    assert {event["step"] for event in events} == {1}
    assert all(record["lr"] > 0.0 for record in metrics)
    assert len(metrics) == 24
    corrections = sum(record.get("corrections", {}).get("done", 0) for record in metrics)
    assert bool(corrections) == (correction == "second-order")
    summary = json.loads((world.folder / "runs" / name / "summary.json").read_text())
    looked = summary["refresh_tokens"] / 256  # batches: of one-shot eight, of iterative one and a look for each bundle
    assert looked == 8 if mode == "one-shot" else looked >= 4
    assert summary["flops_by_part"]["looks"] > 0
    assert summary["result"]["parameters"] <= 0.5 * summary["source"]["parameters"]


def test_one_shot_without_correction_only_zeroes(world: World) -> None:
    """Every weight that is left equals the source's, but for the rescaled gains: at a rate that changes no bit."""
    prune = {"mode": "one-shot", "correction": "none", "end": None, "bound": None, "types": ["ffn"], "target": "80%"}
    assert call("prune", world.write("cut", prune=prune, train={"tokens": 256, "lr": 1e-30})) == 0
    before = load_file(world.folder / "source" / "model.safetensors")
    after = load_file(world.folder / "runs" / "cut" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if "mlp" not in name)
    down = "model.layers.0.mlp.down_proj.weight"
    columns = {tuple(column.tolist()) for column in before[down].T}
    assert all(tuple(column.tolist()) in columns for column in after[down].T)


@pytest.mark.parametrize("order", ["attention-first", "ffn-first", "stem-first", "interleaved"])
def test_pruning_paths_end_in_one_shape(world: World, order: str) -> None:
    target = {"hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 32}
    prune = {"target": target, "selection": order, "floors": None, "correction": "none"}
    assert call("prune", world.write(order, prune=prune, train={"tokens": 8 * 256})) == 0
    events = records(world, order, "events")
    assert {key: events[-1]["widths"][key] for key in target} == target
    types = [event["type"] for event in events]
    changes = sum(one != other for one, other in pairwise(types))
    if order == "interleaved":
        assert changes > 8
    else:
        assert types[0].startswith(order.split("-")[0])
        assert changes == len(set(types)) - 1


def test_whole_layers_fall_too(world: World) -> None:
    types = ["attention", "attention_query", "ffn", "stem", "depth"]
    target = {"layers": 1, "hidden": 36, "intermediate": 44}
    prune = {"types": types, "target": target, "floors": None}
    assert call("prune", world.write("depth", prune=prune, train={"tokens": 12 * 256})) == 0
    events = records(world, "depth", "events")
    assert "depth" in {event["type"] for event in events}
    assert {key: events[-1]["widths"][key] for key in target} == target
    model = AutoModelForCausalLM.from_pretrained(world.folder / "runs" / "depth" / "model")
    assert len(model.model.layers) == model.config.num_hidden_layers == 1
    metrics = records(world, "depth", "metrics")
    assert metrics[-1]["validation_loss"] < metrics[0]["loss"]


@pytest.fixture(scope="module")
def ladder(world: World) -> Path:
    """The recipe of a finished run that has left two sizes on its way."""
    recipe = world.write("ladder", prune={"ladder": ["80%", "65%", "50%"], "target": None})
    assert call("prune", recipe) == 0
    return recipe


def test_a_ladder_leaves_models_that_train_on(world: World, ladder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world.folder / "runs" / "ladder"
    summary = json.loads((folder / "summary.json").read_text())
    steps = {path: json.loads((path / "summary.json").read_text())["step"] for path in (folder / "ladder").iterdir()}
    milestones = sorted(steps, key=lambda path: steps[path])
    assert len(milestones) == 2
    for milestone, share in zip(milestones, (0.80, 0.65), strict=True):
        facts = json.loads((milestone / "summary.json").read_text())
        assert 0.95 * share < facts["parameters"] / summary["source"]["parameters"] <= share
        model = AutoModelForCausalLM.from_pretrained(milestone / "model")
        assert sum(weight.numel() for weight in model.parameters()) == facts["parameters"]
        assert facts["widths"]["intermediate"] == model.config.intermediate_size
    capsys.readouterr()
    assert call("continue", milestones[1]) == 0
    out = capsys.readouterr().out.strip()
    onward = folder / "continued" / milestones[1].name
    assert out == str(onward / "model")
    went_on = read_journal(onward / "metrics.jsonl")
    reached = json.loads((milestones[1] / "summary.json").read_text())
    assert went_on[0]["step"] == reached["step"] + 1
    assert went_on[-1]["step"] == 24
    whole = read_journal(folder / "metrics.jsonl")
    here = next(record for record in whole if record["step"] == went_on[0]["step"])
    assert went_on[0]["loss"] == here["loss"]  # the same weights on the same batch
    assert went_on[-1]["live_parameters"] == reached["parameters"]


def test_a_ladder_is_left_again_after_a_kill(world: World, ladder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoints and the smaller size are lost: it comes again, bit for bit, and for no other recipe."""
    folder = world.folder / "runs" / "ladder"
    steps = {
        json.loads((milestone / "summary.json").read_text())["step"]: milestone
        for milestone in (folder / "ladder").iterdir()
    }
    milestone = steps[max(steps)]
    before = load_file(milestone / "model" / "model.safetensors")
    shutil.rmtree(milestone)
    for checkpoint in checkpoints(folder / "checkpoints"):
        shutil.rmtree(checkpoint)
    (folder / "summary.json").unlink()
    assert call("prune", ladder, "train.lr=2e-2") == 2
    assert "belongs to a recipe with train.lr=0.01, not 0.02" in capsys.readouterr().err
    assert call("prune", ladder) == 0
    after = load_file(milestone / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_criteria_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("criteria") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CRITERIA)


def test_probe_takes_its_device_and_how_many_rows_it_passes_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("probe", "model", "--data", "text", "--device", "cuda:99") == 2
    assert "device 'cuda:99' is not available here; set train.device, or --device" in capsys.readouterr().err
    asked: list[ProbeRequest] = []
    monkeypatch.setattr(probing, "run_probe", lambda request, say: asked.append(request) or {"criteria": {"flap": {}}})
    assert call("probe", "model", "--data", "text", "--device", "cpu", "--micro-batch", "2", "--seed", "5") == 0
    assert [(each.device, each.micro_batch, each.seed) for each in asked] == [("cpu", 2, 5)]


def test_distillation_in_the_loop_and_in_recovery(world: World) -> None:
    assert call("prune", world.write("taught", distill={"weight": 0.7})) == 0
    losses = [record["loss"] for record in records(world, "taught", "metrics")]
    assert losses[0] < 0.5 * 5.6  # at first the student is the teacher: no divergence, three tenths of the loss
    assert losses[-1] < 5.0
    for name in ("cached", "cached-again"):  # the second run finds every logit on the disk
        assert call("prune", world.write(name, distill={"weight": 0.7, "samples": 20})) == 0
    (cache,) = (world.folder / "cache").glob("teacher-*-drawn-1-20")
    rows = (cache / "keys.bin").stat().st_size // 16
    assert rows == 24 * 8
    assert records(world, "cached", "metrics")[-1]["loss"] == records(world, "cached-again", "metrics")[-1]["loss"]


def test_hidden_states_of_a_ladder_and_of_what_goes_on_from_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher costs what it costs for its logits alone; a milestone knows its channels in the source."""
    distill = {"weight": 0.5, "hidden": 1.0}
    recipe = world.write("streams", prune={"ladder": ["60%", "50%"], "target": None}, distill=distill)
    assert call("prune", recipe) == 0
    folder = world.folder / "runs" / "streams"
    (milestone,) = (folder / "ladder").iterdir()
    assert call("continue", milestone) == 0
    went_on = read_journal(folder / "continued" / milestone.name / "metrics.jsonl")
    whole = read_journal(folder / "metrics.jsonl")
    assert went_on[0]["loss"] == next(each["loss"] for each in whole if each["step"] == went_on[0]["step"])
    flops = json.loads((folder / "summary.json").read_text())["flops_by_part"]
    source = space_of(load_config(str(world.folder / "source")))
    assert flops["teacher"] == 24 * teacher_flops(forward_flops(source, 8, 32))
    capsys.readouterr()
    assert call("prune", world.write("narrow", distill=distill | {"teacher": str(milestone / "model")})) == 2
    assert "choose a teacher of the source's shape, or leave distill.hidden out" in capsys.readouterr().err


def test_a_stem_that_is_turned_first(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source is as good as before, the pass for its components is on the bill, and the run lands as any other."""
    from conftest import tiny_model

    untied = tiny_model("llama-gqa", vocab_size=300)
    untied.save_pretrained(tmp_path)
    load_tokenizer(str(world.folder / "source")).save_pretrained(tmp_path)
    short = {"tokens": 4 * 256}
    for name, rotate in (("straight", "off"), ("turned", "auto")):
        recipe = world.write(name, train=short, prune={"rotate": rotate})
        assert call("prune", recipe, f"source={tmp_path}", f"tokenizer={tmp_path}") == 0
    assert "turned into its principal components, by 10 rows" in capsys.readouterr().err
    runs = [world.folder / "runs" / name for name in ("straight", "turned")]
    losses = [json.loads((run / "source.json").read_text())["validation_loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    summary = json.loads((runs[1] / "summary.json").read_text())
    assert summary["flops_by_part"]["looks"] > forward_flops(space_of(untied.config), 10, 32).base
    assert summary["result"]["parameters"] <= 0.5 * summary["source"]["parameters"]
    assert call("prune", world.write("tied", train=short, prune={"rotate": "auto"})) == 0
    assert "prune.rotate auto: the source is pruned as it stands, since its LM head is its embedding" in (
        capsys.readouterr().err
    )
