"""A mixture of experts through the whole job: pruned, stopped and resumed, exported; and what is refused of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import World, tiny_model
from efficientllm.checkpoint.store import checkpoints, load
from efficientllm.config import Recipe
from efficientllm.distributed.ranks import ALONE
from efficientllm.models.loading import load_config
from efficientllm.reporting.journal import read_journal
from efficientllm.training import planning
from efficientllm.training.run_plan import run_plan
from processes import call, same_weights

TRAIN = {"tokens": 12 * 256, "batch_tokens": 256, "micro_batch": 4, "lr": 1e-2}
RUN = {"checkpoint_every": 256, "keep": 12}
PRUNE: dict[str, Any] = {"target": "60%", "end": "60%", "floors": {"intermediate": 8}}


@pytest.fixture(scope="module")
def source(world: World) -> Path:
    folder = world.folder / "mixture"
    shape = {"vocab_size": 300, "num_experts": 6, "moe_intermediate_size": 24, "output_router_logits": True}
    tiny_model("qwen3-moe-gqa", **shape, router_aux_loss_coef=0.01).save_pretrained(folder)
    for file in (world.folder / "source").glob("token*"):
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def pruned(world: World, source: Path) -> Path:
    """Cut only once it is over, so that dead experts are trained beside for some steps."""
    recipe = world.write("experts", source=str(source), train=TRAIN, prune=PRUNE, run=RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "COMPACT_AT", 0.9)
        assert call("prune", recipe) == 0
    return world.folder / "runs" / "experts"


def test_experts_fall_and_plain_transformers_loads_what_is_left(pruned: Path) -> None:
    summary = json.loads((pruned / "summary.json").read_text())
    widths = summary["result"]["widths"]
    events = read_journal(pruned / "events.jsonl")
    assert {"expert", "expert_ffn"} & {event["type"] for event in events}
    assert read_journal(pruned / "compactions.jsonl")
    assert 2 <= widths["experts"] <= 6
    assert widths["hidden"] % 8 == widths["expert_intermediate"] % 8 == 0
    model = AutoModelForCausalLM.from_pretrained(pruned / "model", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.config.num_experts == widths["experts"]
    assert sum(weight.numel() for weight in model.parameters()) == summary["result"]["parameters"]
    assert model.model.layers[0].mlp.gate.weight.all()
    assert call("export", pruned, "--to", "hf", "--check", "--out", pruned / "exported") == 0


def test_a_run_that_is_gone_on_with_ends_bitwise_as_the_calm_one(world: World, source: Path, pruned: Path) -> None:
    """From a checkpoint that lies between an event and its compaction, where experts are dead and not yet cut."""
    recipe = world.write("experts-again", source=str(source), train=TRAIN, prune=PRUNE, run=RUN)
    again = world.folder / "runs" / "experts-again"
    shutil.copytree(pruned, again)
    shutil.rmtree(again / "model")
    (again / "summary.json").unlink()
    saved = checkpoints(again / "checkpoints")
    first = next(each for each in saved if not load(each, ALONE).pruner_tensors["live.expert"].all())
    for later in saved[saved.index(first) + 1 :]:
        shutil.rmtree(later)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "COMPACT_AT", 0.9)
        assert call("prune", recipe) == 0
    assert same_weights(pruned, again)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"types": ["ffn"]}, "prune.types has ffn, but the source has no FFN but those of experts: write expert_ffn"),
        ({"target": {"experts": 1}}, "target experts 1 is below the 2 that every token uses"),
        ({"floors": {"experts": 1}}, "prune.floors.experts 1 is below the 2 experts that every token uses"),
        ({"align": 4}, "prune.align 4 leaves experts that torch's grouped products cannot read"),
        ({"target": {"intermediate": 12}}, "prune.target.intermediate 12 leaves experts that torch's"),
        ({"saliency": "reap"}, "reap scores experts and not attention: write prune.saliency {expert: reap}"),
    ],
)
def test_what_cannot_be_done_with_experts_is_said(
    world: World, source: Path, prune: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = world.write("refused", source=str(source), train=TRAIN, prune=PRUNE | prune)
    assert call("prune", recipe) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_defaults_are_those_of_experts(world: World, source: Path) -> None:
    """And criteria by name for those types go with them."""
    prune = {"saliency": {"expert": "reap"}, "target": {"experts": 4}}
    content = world.recipe("defaults", source=str(source), train=TRAIN, prune=prune)
    plan = run_plan(Recipe.model_validate(content), load_config(str(source)))
    assert plan.pruning is not None
    assert plan.pruning.options.types == ("attention", "attention_query", "expert", "expert_ffn", "stem")


def test_heads_under_a_norm_over_all_of_them_are_refused_and_left_out_by_default(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.folder / "olmoe"
    tiny_model("olmoe-gqa", vocab_size=300).save_pretrained(folder)
    content = world.recipe("olmoe", source=str(folder), train=TRAIN, prune=PRUNE | {"target": "80%"})
    plan = run_plan(Recipe.model_validate(content), load_config(str(folder)))
    assert plan.pruning is not None
    assert plan.pruning.options.types == ("expert", "expert_ffn")
    assert any("attention, attention_query, stem cannot fall: its q and k norms" in note for note in plan.advisories)
    recipe = world.write("olmoe-heads", source=str(folder), train=TRAIN, prune=PRUNE | {"types": ["attention"]})
    assert call("prune", recipe) == 2
    assert "prune.types has attention, which cannot fall here: its q and k norms" in capsys.readouterr().err
