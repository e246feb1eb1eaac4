"""A run that diverges saves nothing of it, and what it says to do next can be done."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import World
from efficientllm.checkpoint.store import checkpoints
from efficientllm.reporting.journal import read_journal
from processes import call


@pytest.fixture(scope="module")
def diverged(world: World) -> tuple[Path, str]:
    """The recipe of a run whose weights an update of finite norm ruins in step 16, which is saved; and what it says."""
    from efficientllm.training import loop

    real, calls = loop.update, [0]

    def update(optimizer: Any, weights: Any, **options: Any) -> float:
        weights = list(weights)
        calls[0] += 1
        norm = real(optimizer, weights, **options)
        if calls[0] == 16:
            with torch.no_grad():
                weights[-1][0] = float("inf")
        return norm

    recipe = world.write("ruined", prune={"end": "25%"})
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(loop, "update", update)
        assert call("prune", recipe) == 2
    return recipe, said.getvalue().strip().splitlines()[-1]


def test_weights_that_are_not_finite_are_not_saved(world: World, diverged: tuple[Path, str]) -> None:
    saved = checkpoints(world.folder / "runs" / "ruined" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000008"]
    assert "after step 16 some weights are not finite; the last good checkpoint is" in diverged[1]


def test_the_advice_can_be_followed(world: World, diverged: tuple[Path, str]) -> None:
    """Another rate in another folder, from the checkpoint that is named: the whole run's records are there."""
    recipe, said = diverged
    resume = re.search(r"resume=(\S+)", said)
    assert resume is not None
    again, before = world.folder / "runs" / "again", world.folder / "runs" / "ruined"
    argv = ("prune", recipe, f"run.dir={again}", f"resume={resume[1]}", "train.lr=5e-3")
    assert call(*argv) == 0
    metrics = read_journal(again / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 25))
    assert metrics[:8] == read_journal(before / "metrics.jsonl")[:8]
    assert metrics[8]["lr"] == pytest.approx(0.5 * read_journal(before / "metrics.jsonl")[8]["lr"])
    assert json.loads((again / "source.json").read_text()) == json.loads((before / "source.json").read_text())
    summary = json.loads((again / "summary.json").read_text())
    assert summary["result"]["parameters"] <= 0.5 * summary["source"]["parameters"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["resume=nowhere"], "resume nowhere is no checkpoint"),
        (["resume={saved}", "prune=null"], "is of a run that prunes; give the recipe its prune section"),
        (["resume={saved}", "source={other}"], "is of a run from another source; set source to"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    world: World, diverged: tuple[Path, str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from efficientllm.models.loading import load_model, load_tokenizer
    from efficientllm.models.space import build, narrowed_config, space_of
    from efficientllm.pruning.widths import Widths

    (saved,) = checkpoints(world.folder / "runs" / "ruined" / "checkpoints")
    other = world.folder / "other"
    config = load_model(str(world.folder / "source")).config
    wide = space_of(config).widths
    build(narrowed_config(config, Widths(wide.layers, wide.hidden, wide.heads, wide.kv_heads, 44))).save_pretrained(
        other
    )
    load_tokenizer(str(world.folder / "source")).save_pretrained(other)
    more = [each.format(saved=saved, other=other) for each in more]
    command = "train" if "prune=null" in more else "prune"
    assert call(command, diverged[0], f"run.dir={world.folder / 'runs' / 'refused'}", *more) == 2
    assert message in capsys.readouterr().err


def test_a_bad_batch_is_skipped_and_a_diverged_run_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradient turns to NaN at chosen steps; what follows is as if their batches had been read and no more."""
    from efficientllm.training.passes import Passes, Use

    real, calls, bad = Passes.backward, [0], {3, 4, 9}

    def poisoned(passes: Passes, use: Use, *more: object) -> tuple[torch.Tensor, object]:
        calls[0] += use == "step"
        loss, inputs = real(passes, use, *more)  # type: ignore[arg-type]
        return (loss * float("nan") if use == "step" and calls[0] in bad else loss), inputs

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
