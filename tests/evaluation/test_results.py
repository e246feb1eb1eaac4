"""What an evaluation has found: one figure a task, their mean, results of one way of measuring in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efficientllm.evaluation.harness import EvalRequest, joined_with, results_file
from efficientllm.evaluation.tasks import COMMON_SENSE, PAPER, TASKS, common_sense_mean, eval_rows
from efficientllm.reporting.evaluation_table import accuracy, known_results


def test_a_task_without_accuracy_is_shown_by_its_first_metric() -> None:
    values = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.125, "other,none": 3.0}
    assert accuracy(values) == ("exact_match", 0.25, 0.125)
    assert str(accuracy(values)) == "0.25 ± 0.12 exact_match"
    assert accuracy({"acc,none": 0.5, "acc_norm,none": 0.75}) == ("acc_norm", 0.75, None)
    found = {"m": {"results": {"gsm8k": values, "boolq": {"acc,none": 0.5, "acc_stderr,none": 0.01}}}}
    head, own, *paper = eval_rows(found, ["gsm8k", "boolq", "piqa"])
    assert head == ["model", "gsm8k", "BoolQ", "PIQA", "Avg of 7"]
    assert own == ["m", "0.25 ± 0.12 exact_match", "50.00 ± 1.0 a", "-", "-"]
    assert paper[0] == ["paper: SmolLM-135M (600B tokens)", "-", "59.85", "68.55", "49.87"]
    assert len(list(eval_rows(found, ["gsm8k"]))) == 2  # the paper has no such task


def test_the_mean_is_that_of_the_paper() -> None:
    averages = {"SmolLM-135M (600B tokens)": 49.87, "EfficientLLM-A 469M (500B)": 57.35, "Llama3.2-1B": 56.69}
    for name, average in averages.items():
        assert common_sense_mean(PAPER[name]) == pytest.approx(average, abs=0.006)
    assert common_sense_mean(dict.fromkeys(list(COMMON_SENSE)[:6], 0.5)) is None
    assert set(TASKS) == {"mmlu", *COMMON_SENSE}


WAY = {"harness": "0.4.13", "limit": 4, "data": "local", "num_fewshot": 0}


def measured(tasks: list[str], **changes: object) -> dict[str, Any]:
    results = {task: {"acc,none": 0.5} for task in tasks}
    found = WAY | {"results": results, "versions": dict.fromkeys(tasks, 1), "records": dict.fromkeys(tasks, 4)}
    return found | {"mean": common_sense_mean(dict.fromkeys(tasks, 0.5))} | changes


def test_results_measured_in_another_way_are_not_mixed() -> None:
    known, found = measured(["piqa"]), measured(["boolq"])
    assert joined_with(known, found)["results"].keys() == {"piqa", "boolq"}
    assert joined_with(known | {"data": "hub"}, found) == found
    assert joined_with(known | {"sample": 4}, found) == found
    assert joined_with({}, found) == found


def test_the_mean_is_there_once_all_seven_are() -> None:
    first, *others = COMMON_SENSE
    known, found = measured([first]), measured(others)
    assert known["mean"] is found["mean"] is None
    assert joined_with(known, found)["mean"] == pytest.approx(0.5)


def test_a_limited_evaluation_leaves_the_whole_one_alone(tmp_path: Path) -> None:
    file, limited, whole = tmp_path / "eval/results.json", EvalRequest(limit=10), EvalRequest()
    assert results_file(tmp_path, limited) == file
    file.parent.mkdir()
    file.write_text(json.dumps(measured(["boolq"], limit=40)))
    assert results_file(tmp_path, limited) == results_file(tmp_path, whole) == file
    file.write_text(json.dumps(measured(["boolq"], limit=None)))
    assert results_file(tmp_path, limited) == tmp_path / "eval/results-limit-10.json"
    assert results_file(tmp_path, EvalRequest(sample=20)) == tmp_path / "eval/results-sample-20.json"
    assert results_file(tmp_path, whole) == file
    for damaged in ("[]", "{", '{"results": [1]}', '{"versions": 3}'):
        file.write_text(damaged)
        assert known_results(file) == {}
        assert results_file(tmp_path, limited) == file
