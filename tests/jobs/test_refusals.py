"""What cannot be run is said in one sentence, before anything is loaded or measured where that can be known then."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import World, tiny_model
from processes import call


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 61 tokens; the world's tokenizer has 256 bytes alone."""
    folder = tmp_path_factory.mktemp("stranger")
    tiny_model("llama-gqa").save_pretrained(folder)
    return folder


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
        ({"prune": {"ladder": ["120%"]}}, "120%"),
        ({"prune": {"ladder": [90_000_000]}}, "is not below the source's"),
        ({"prune": {"ladder": ["60%", "80%"]}}, "put the largest first"),
        ({"prune": {"ladder": ["40%"]}}, "put the largest first"),
        ({"prune": {"selection": "ffn-first"}}, "give prune.target as widths"),
        ({"prune": {"ladder": ["50.2%"], "align": 16}}, "choose sizes further apart"),
        ({"prune": {"mode": "iterative", "end": None, "start": "99%"}}, "raise train.tokens"),
        ({"prune": {"mode": "one-shot"}}, "prune.end has no effect with prune.mode one-shot"),
        ({"prune": {"saliency": "wandda"}}, "did you mean 'wanda'"),
        ({"prune": {"target": {"layers": 1}}}, "needs pruning type 'depth'"),
        (
            {"prune": {"rotate": "auto", "types": ["ffn"]}},
            "prune.rotate has no effect where prune.types leaves out",
        ),
        ({"distill": {"top_k": 20}}, "distill.top_k is gone"),
        ({"distill": {"teacher": "STRANGER"}}, "has another vocabulary (61 entries)"),
        ({"source": "STRANGER", "tokenizer": "TOKENIZER"}, "do not belong together"),
        ({"init": "random", "distill": {"weight": 0.5}}, "distill.teacher is missing"),
    ],
)
def test_bad_input_gets_one_sentence(
    world: World, stranger: Path, sections: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = world.write("bad", **sections), world.folder / "runs" / "bad"
    there = {"STRANGER": str(stranger), "TOKENIZER": str(world.folder / "tokenizer")}
    recipe.write_text(re.sub("|".join(there), lambda name: there[name[0]], recipe.read_text()))
    try:
        assert call("prune", recipe) == 2
        assert (folder / "source.json").exists() == ("lr" in sections.get("train", {}))  # the others measure nothing
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_continue_wants_a_snapshot(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("continue", world.folder) == 2
    assert "is not a snapshot of a ladder" in capsys.readouterr().err


def test_out_of_memory_names_the_mend(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from efficientllm.training.passes import Passes

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Passes, "backward", refuse)
    assert call("prune", world.write("memory")) == 2
    assert "lower train.micro_batch" in capsys.readouterr().err
