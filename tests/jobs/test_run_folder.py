"""Whether a recipe belongs to a run folder: asking writes nothing, adopting writes the recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from conftest import World
from efficientllm.comparison.work import placed
from efficientllm.config import Recipe
from efficientllm.errors import UsageError
from efficientllm.jobs.run_folder import RunFolder, fingerprint
from efficientllm.reporting.journal import read_journal


def test_a_check_writes_nothing(world: World) -> None:
    recipe = Recipe.model_validate(world.recipe("checked"))
    folder = RunFolder(recipe.run.dir)
    folder.check(recipe)
    assert not folder.path.exists()
    folder.adopt(recipe)
    (folder.checkpoints / "step-00000008").mkdir(parents=True)
    before = folder.config.read_bytes()
    other = Recipe.model_validate(world.recipe("checked", train={"lr": 5e-3}))
    assert folder.difference(recipe) is None
    assert folder.difference(other) == ("train.lr", 0.01, 0.005)
    for refused in (folder.check, folder.adopt):
        with pytest.raises(UsageError, match=r"belongs to a recipe with train\.lr=0\.01, not 0\.005"):
            refused(other)
    assert folder.config.read_bytes() == before


def test_a_run_of_another_version_says_so_and_another_is_placed_beside_it(world: World) -> None:
    recipe = Recipe.model_validate(world.recipe("older"))
    folder = RunFolder(recipe.run.dir)
    folder.adopt(recipe)
    saved = folder.checkpoints / "step-00000008"
    saved.mkdir(parents=True)
    content = yaml.safe_load(folder.config.read_text())
    content["prune"]["ema"] = 0.9
    folder.config.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError) as error:
        folder.check(recipe)
    message = str(error.value)
    assert message.startswith(f"run folder {folder.path} was begun by another version: prune.ema is gone: leave it out")
    assert message.endswith(f"; choose another run.dir, with resume={saved} to go on from there")
    assert placed(recipe).run.dir == f"{recipe.run.dir}-{fingerprint(recipe)}"
    folder.config.write_text("{half")
    with pytest.raises(UsageError, match=r"config\.yaml is damaged; restore it"):
        placed(recipe)


def test_a_run_beside_another_is_found_again_under_the_name_that_an_earlier_version_gave_it(world: World) -> None:
    """Which wrote the choice of types as auto, where today's recipe, and so its fingerprint, has raw."""
    own, other = (Recipe.model_validate(world.recipe("beside", train={"lr": lr})) for lr in (1e-2, 5e-3))
    folder, beside = RunFolder(own.run.dir), RunFolder(f"{own.run.dir}-0123abcd")
    for begun, recipe in ((folder, own), (beside, other)):
        begun.adopt(recipe)
        (begun.checkpoints / "step-00000008").mkdir(parents=True)
    beside.config.write_text(beside.config.read_text().replace("selection: raw", "selection: auto"))
    broken = RunFolder(f"{own.run.dir}-00000000")
    broken.path.mkdir()
    for file in (broken.config, broken.summary):
        file.write_text("{half")
    assert placed(own).run.dir == own.run.dir
    assert placed(other).run.dir == str(beside.path)
    third = Recipe.model_validate(world.recipe("beside", train={"lr": 1e-3}))
    assert placed(third).run.dir == f"{own.run.dir}-{fingerprint(third)}"


def test_another_run_s_journals_take_the_place_of_what_there_is(tmp_path: Path) -> None:
    """Also of a journal that the other run lacks: it may have had no event before that checkpoint."""
    mine, other = RunFolder(tmp_path / "mine"), RunFolder(tmp_path / "other")
    for folder in (mine, other):
        folder.path.mkdir()
        folder.source.write_text(json.dumps({"path": folder.path.name}))
    mine.events.append({"step": 3})
    mine.metrics.append({"step": 3})
    other.metrics.append({"step": 10})
    mine.take_over(other)
    assert [read_journal(each.path) for each in mine.journals if each.path.is_file()] == [[{"step": 10}]]
    assert mine.read_json(mine.source) == {"path": "other"}


def test_a_fingerprint_is_of_what_a_run_is_to_learn(world: World) -> None:
    recipe = Recipe.model_validate(world.recipe("one"))
    elsewhere = Recipe.model_validate(world.recipe("two", train={"device": "cpu"}, run={"keep": 5}))
    assert fingerprint(recipe) == fingerprint(elsewhere)
    assert len(fingerprint(recipe)) == 8
    longer = Recipe.model_validate(world.recipe("one", train={"tokens": 48 * 256}))
    assert fingerprint(recipe) != fingerprint(longer)


# Of which the finished run has had no occasion.
RARE = {
    "metrics": {"validation_bits_per_byte", "nonfinite"},
    "events": {"cost", "saved"},
    "compactions": {"vocabulary"},
}


@pytest.mark.parametrize("name", RARE)
def test_the_docs_name_every_key_of_a_run_s_records(finished: Path, name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}.jsonl` |"))
    lines = read_journal(finished / f"{name}.jsonl")
    assert set(re.findall(r"`(\w+)`", row)) - RARE[name] == set().union(*lines)
    assert name != "metrics" or ", ".join(lines[0]["flops_by_part"]) in row
