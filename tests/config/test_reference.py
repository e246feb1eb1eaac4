"""The reference of recipe keys: complete, as the repository shows it, and of the words that the code knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from efficientllm.config import CostTarget, PruneConfig, Recipe, Trait
from efficientllm.config.reference import free_keys, recipe_keys
from efficientllm.models.flops import FlopsPerToken
from efficientllm.pruning.costs import ActiveParams, KVCache, Params, TableCost
from efficientllm.pruning.dimensions import EXPERT_TYPES, PRUNING_TYPES, VOCAB
from efficientllm.pruning.schedule import CURVES
from efficientllm.pruning.selection import ORDERS
from processes import call

ROOT = Path(__file__).parents[2]


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
    page = (ROOT / "docs" / "distributed.md").read_text()
    for section, keys in free_keys().items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{section}` |"))
        assert set(re.findall(r"`(\w+)`", line)) == {section, *keys}
    assert free_keys()["data"] == {"cache_dir", "workers"}
    assert PruneConfig.having(Trait.ARM) == {"target", "cost", "ladder", "mode", "saliency", "correction"}


def test_lists_of_words_are_those_of_the_pruning_room() -> None:
    """Words that a type checker is to know stand in config a second time."""
    words = {key.name.removeprefix("prune."): key.choices for key in recipe_keys()}
    assert words["types"] == (*PRUNING_TYPES, *EXPERT_TYPES, VOCAB)
    assert set(words["curve"]) == {*CURVES, "exponential"}
    assert set(words["selection"]) == {"raw", "interleaved", *ORDERS}
    costs = (Params, ActiveParams, FlopsPerToken, KVCache, TableCost)
    assert words["cost"] == tuple(each.__dataclass_fields__["name"].default for each in costs)
    sizes = {name.replace("_", "-") for name in CostTarget.model_fields}
    assert sizes == {*words["cost"]} - {"params"}
