"""Single records: which are drawn, which were right, how two models differ on the same ones."""

from __future__ import annotations

import json
import shutil
import statistics
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import World, tiny_model
from efficientllm.cli import main
from efficientllm.evaluation.records import drawn, paired_difference, right_records


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


def test_a_sample_is_the_same_for_every_model_and_pairs_them(
    world: World, listed_tasks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 of 40 records, which differ; two models; the difference by record, and its error, by hand."""
    folder, out, other = tmp_path / "records", tmp_path / "out.json", tmp_path / "other"
    file = folder / "baber/piqa/default/validation.jsonl"
    file.parent.mkdir(parents=True)
    pairs = 2 * list(permutations(["model", "write", "short", "words", "heads"], 2))  # as long as each other
    many = [
        {"goal": f"To prune {number}", "sol1": one, "sol2": two, "label": number % 2}
        for number, (one, two) in enumerate(pairs)
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in many))
    shutil.copytree(world.folder / "source", other)
    tiny_model("llama-gqa", seed=5, vocab_size=300, tie_word_embeddings=True).save_pretrained(other)
    models = (str(world.folder / "source"), str(other))
    options = ("--data-dir", folder, "--batch-size", "4", "--device", "cpu", "--json", out, "--sample", "12")
    assert call("eval", *models, "--tasks", "piqa", *options) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    one, two = (found[model]["right"]["piqa"]["piqa"] for model in models)
    asked = sorted(map(int, one))
    assert one.keys() == two.keys()
    assert len(asked) == 12
    assert asked != list(range(12))
    assert asked == drawn("piqa", 12, FakeManager({"piqa": 40}))["piqa"]
    for model in models:
        right = found[model]["right"]["piqa"]["piqa"]
        assert found[model]["results"]["piqa"]["acc_norm,none"] == pytest.approx(sum(right.values()) / 12)
        assert found[model]["sample"] == 12
    differences = [two[record] - one[record] for record in one]
    assert any(differences)
    error = statistics.stdev(differences) / 12**0.5
    assert f"| minus {models[0]}, by record | PIQA |" in printed
    assert f"| {other} | {100 * statistics.mean(differences):+.2f} ± {100 * error:.1f} |" in printed
    assert "12 records of each task, drawn at random" in printed


class FakeManager:
    """Tasks of so many records."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._tasks = {name: SimpleNamespace(eval_docs=range(number)) for name, number in sizes.items()}

    def load(self, names: list[str]) -> dict[str, Any]:
        return {"tasks": self._tasks}


def test_every_subtask_is_drawn_from_by_itself() -> None:
    chosen = drawn("mmlu", 10, FakeManager({"mmlu_anatomy": 135, "mmlu_virology": 135, "mmlu_tiny": 4}))
    assert [len(each) for each in chosen.values()] == [10, 10, 4]
    assert chosen["mmlu_anatomy"] != chosen["mmlu_virology"]
    assert chosen["mmlu_tiny"] == [0, 1, 2, 3]
    assert all(each == sorted(set(each)) for each in chosen.values())


def test_pairs_are_of_records_that_both_were_asked() -> None:
    one, two = {"a": {"0": 1, "1": 1, "5": 0}, "b": {"0": 1}}, {"a": {"0": 0, "1": 1, "9": 1}, "c": {"0": 0}}
    assert paired_difference(one, two) == (0.5, 0.5)
    assert paired_difference({"a": {"9": 0}}, two)[0] == -1.0  # type: ignore[index]
    assert paired_difference({}, two) is None
    assert right_records({"samples": {"a": [{"doc_id": 3, "acc": 1.0}, {"doc_id": 4, "acc": 0.0}]}}, "acc") == {
        "a": {"3": 1, "4": 0}
    }
    assert right_records({"samples": {"a": [{"doc_id": 3, "exact_match": 0.3}]}}, "exact_match") == {}
