"""Keys that recipes once had: refused with what to do instead, and read where an older version has dumped them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from efficientllm.config import GONE, Recipe, dump_recipe, without_gone
from efficientllm.config.reference import recipe_keys
from efficientllm.errors import UsageError

Load = Callable[..., Recipe]
Refusal = Callable[..., str]


@pytest.mark.parametrize("key", [key for key in GONE if "[]" not in key and not key.startswith("prune.align.")])
def test_a_key_that_went_is_refused_with_what_to_do_instead(refusal: Refusal, key: str) -> None:
    assert key not in {each.name for each in recipe_keys()}
    assert refusal(f"{key}=1") == f"{key} is gone: {GONE[key].instead}"


def test_what_an_older_version_has_dumped_loads_where_nothing_else_was_meant(load: Load) -> None:
    text = dump_recipe(load("data.train=org/data:en:train", "prune.align=64", "data.validation=b.txt"))
    old = yaml.safe_load(text)
    old["source_tokens"] = None
    old["data"] |= {"text_column": "text", "train": [{"path": "org/data", "name": "en", "split": "train"}]}
    old["prune"] |= {"ema": 0.5, "compact_at": "4%", "align": {"hidden": 64, "intermediate": 64}, "order": "saliency"}
    old["prune"] |= {"correction_damping": 0.3, "calibration_tokens": None}
    old["prune"]["latency_on"] = {"device": "cpu", "dtype": "fp32"}  # it has only said what to expect of the table
    old["run"]["log_every"] = 10
    assert Recipe.model_validate(without_gone(old)) == load(text=text)
    old["prune"]["ema"] = 0.9
    with pytest.raises(UsageError, match=r"^prune\.ema is gone"):
        Recipe.model_validate(without_gone(old))


def test_selection_auto_is_the_old_word_for_raw_and_calibrated_is_gone(load: Load, refusal: Refusal) -> None:
    assert load("prune.selection=auto") == load("prune.selection=raw") == load()
    old = yaml.safe_load(dump_recipe(load()))
    old["prune"] |= {"selection": "calibrated", "calibration_tokens": "2K"}
    said = "prune.selection: calibrated is gone, since a measured factor a type chose a worse shape"
    assert refusal("prune.selection=calibrated").startswith(said)
    with pytest.raises(UsageError, match=said):  # as the config.yaml of a run that is to go on
        Recipe.model_validate(without_gone(old))


@pytest.mark.parametrize(
    ("section", "old", "overrides"),
    [
        ("data", {"validation_fraction": "1%", "validation": None}, ["data.validation=1%"]),
        (
            "data",
            {
                "text_column": "content",
                "train": [
                    {"path": "a.jsonl", "text_column": None},
                    {"path": "b.jsonl", "text_column": "body"},
                    "c.jsonl",
                ],
                "validation": [{"path": "d.jsonl"}],
            },
            [
                "data.train=[{path: a.jsonl, text_column: content}, {path: b.jsonl, text_column: body}, "
                "{path: c.jsonl, text_column: content}]",
                "data.validation={path: d.jsonl, text_column: content}",
            ],
        ),
        (
            "prune",
            {"order": "ffn-first", "selection": "calibrated", "target": {"hidden": 512}},
            ["prune.selection=ffn-first", "prune.target={hidden: 512}"],
        ),
    ],
)
def test_what_an_older_version_has_dumped_goes_on_under_the_key_that_came_after(
    load: Load, section: str, old: dict[str, Any], overrides: list[str]
) -> None:
    content = yaml.safe_load(dump_recipe(load()))
    del content["data"]["validation"]
    before = content | {section: content[section] | old}
    assert Recipe.model_validate(without_gone(before)) == load(*overrides)
    assert before[section] == content[section] | old  # what was given stays as it was


def test_the_config_of_a_run_folder_is_read_as_one_that_an_older_version_may_have_dumped(
    load: Load, refusal: Refusal
) -> None:
    """`efficientllm prune RUN/config.yaml` is what users are told to type."""
    content = yaml.safe_load(dump_recipe(load()))
    content["prune"]["ema"] = 0.5
    text = yaml.safe_dump(content)
    assert refusal(text=text).startswith("prune.ema is gone")
    assert load(text=text, name="config.yaml") == load()
