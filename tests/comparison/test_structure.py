"""Kept units replayed from the journals point at the very weights that the result has kept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from conftest import World
from efficientllm.comparison.structure import kept_units, overlaps
from efficientllm.config import Recipe
from efficientllm.errors import UsageError
from efficientllm.jobs.prune import run
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.journal import read_journal
from efficientllm.training import planning


def test_kept_units_are_those_of_the_result(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "COMPACT_AT", 0.02)
    widths = {"hidden": 33, "heads": 1, "kv_heads": 1, "intermediate": 41}
    recipe = world.recipe(
        "rest",
        train={"lr": 1e-12, "weight_decay": 0.0, "tokens": 8 * 256},
        prune={"target": widths, "correction": "none", "curve": "linear"},
    )
    summary = run(Recipe.model_validate(recipe), lambda line: None)
    folder = world.folder / "runs" / "rest"
    events, compactions = (read_journal(folder / f"{name}.jsonl") for name in ("events", "compactions"))
    assert len(compactions) > 2
    source_widths = Widths(**summary["source"]["widths"])
    kept = kept_units(source_widths, events, compactions)
    source = load_file(world.folder / "source" / "model.safetensors")
    result = load_file(folder / "model" / "model.safetensors")
    stem = torch.tensor(sorted(kept["stem"][0]))
    for layer in range(2):
        ffn = torch.tensor(sorted(kept["ffn"][layer]))
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        torch.testing.assert_close(result[name], source[name][stem][:, ffn])
        (group,) = kept["attention"][layer]
        (query,) = kept["attention_query"][2 * layer + group]
        assert not kept["attention_query"][2 * layer + 1 - group]
        head = 2 * group + query
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        torch.testing.assert_close(result[name], source[name][stem][:, 6 * head : 6 * head + 6])
    same = overlaps([kept, kept, kept], source_widths)
    assert set(same) == {"attention", "attention_query", "ffn", "stem"}
    assert all(each.jaccard == 1.0 > each.chance for each in same.values())
    with pytest.raises(UsageError, match="do not fit each other"):
        kept_units(source_widths, [*events, events[-1]], compactions)
