"""The reference of recipe keys: complete, and as the repository shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from efficientllm.cli import main
from efficientllm.config import PruneConfig, Recipe
from efficientllm.config.reference import recipe_keys

ROOT = Path(__file__).parents[1]


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return int(stop.value.code or 0)


def test_every_key_is_there_with_what_it_is_without_being_set() -> None:
    keys = {key.name: key for key in recipe_keys()}
    for section, fields in {"": Recipe.model_fields, "prune.": PruneConfig.model_fields}.items():
        assert [name for name in keys if name.removeprefix(section) in fields and name.startswith(section)]
        assert not [name for name in fields if section + name not in keys]
    assert keys["source"].default == keys["prune.target"].default == "required"
    assert keys["prune.end"].default == "auto"
    assert keys["prune.latency_table"].default == "null"  # without effect beside other defaults, yet it has one
    assert keys["data.validation"].default == "0.5%"
    assert keys["prune.curve"].choices == ("linear", "cubic", "cosine", "exponential")
    assert keys["data.train[].weight"].default == "1.0"


def test_there_are_at_most_75_keys() -> None:
    """Counted is what can be given a value, wherever it stands; data.validation is data.train again."""
    names = [key.name for key in recipe_keys()]
    leaves = [name for name in names if not any(other.startswith((f"{name}.", f"{name}[].")) for other in names)]
    assert len(leaves) <= 75


def test_the_page_in_docs_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("keys", "--markdown") == 0
    page = (ROOT / "docs" / "recipe.md").read_text()
    assert capsys.readouterr().out == page, "run: efficientllm keys --markdown > docs/recipe.md"


def test_one_section_or_key_and_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("keys", "run") == 0
    out = capsys.readouterr().out
    assert "run.keep" in out
    assert "train.lr" not in out
    assert call("keys", "prune.floors") == 0
    assert "prune.floors.hidden" in capsys.readouterr().out
    assert call("keys", "prunes") == 2
    assert "sections are" in capsys.readouterr().err


def test_the_keys_that_may_change_on_resume_are_listed() -> None:
    from efficientllm.jobs.run_folder import FREE_KEYS

    page = (ROOT / "docs" / "distributed.md").read_text()
    for section, keys in FREE_KEYS.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{section}` |"))
        assert set(re.findall(r"`(\w+)`", line)) == {section, *keys}
