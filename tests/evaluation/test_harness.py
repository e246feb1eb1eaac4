"""Evaluation by the harness on local records: its own prompts and gold labels, its figures, what is left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import World, task_manager, tiny_model
from efficientllm.cli import main
from efficientllm.errors import UsageError
from efficientllm.evaluation import harness
from efficientllm.evaluation.harness import EvalRequest, _evaluate_task
from efficientllm.evaluation.offline import local_data, local_dataset

pytestmark = pytest.mark.usefixtures("listed_tasks")

ARC = {"question": "What do pruned models do?", "answerKey": "B"}
ARC |= {"choices": {"text": ["sleep", "learn", "vanish"], "label": ["A", "B", "C"]}}
OBQA = {"question_stem": "A small model is", "answerKey": "A"}
OBQA |= {"choices": {"text": ["fast", "slow", "loud", "blue"], "label": ["A", "B", "C", "D"]}}
# hub id/config/split -> a record; what the harness is to make of it: prompt, choices, gold.
RECORDS: dict[str, tuple[str, dict[str, Any], str, list[str], int | str]] = {
    "arc_easy": ("allenai/ai2_arc/ARC-Easy/test", ARC, "Question: What do pruned models do?\nAnswer:", [" learn"], 1),
    "arc_challenge": (
        "allenai/ai2_arc/ARC-Challenge/test", ARC, "Question: What do pruned models do?\nAnswer:", [" vanish"], 1,
    ),
    "openbookqa": ("allenai/openbookqa/main/test", OBQA, "A small model is", [" fast", " blue"], 0),
    "boolq": (
        "aps/super_glue/boolq/validation",
        {"question": "is it small", "passage": "It is.", "idx": 0, "label": 1},
        "It is.\nQuestion: is it small?\nAnswer:", [" no", " yes"], 1,
    ),
    "hellaswag": (
        "Rowan/hellaswag/default/validation",
        {"ind": 0, "activity_label": "Pruning", "ctx_a": "A gardener cuts.", "ctx_b": "she",
         "ctx": "A gardener cuts. she", "endings": ["a", "b", "c", "rests."], "label": "3"},
        "Pruning: A gardener cuts. She", [" rests."], 3,
    ),
    "piqa": (
        "baber/piqa/default/validation",
        {"goal": "To prune", "sol1": "cut", "sol2": "paint", "label": 0},
        "Question: To prune\nAnswer:", [" cut", " paint"], 0,
    ),
    "winogrande": (
        "allenai/winogrande/winogrande_xl/validation",
        {"sentence": "Ann beat Eve because _ trained.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        "Ann beat Eve because Ann", [" trained."], "trained.",  # the options stand in the context
    ),
    "mmlu_anatomy": (
        "cais/mmlu/all/test",
        {"question": "Which is a bone?", "subject": "anatomy", "answer": 0,
         "choices": ["femur", "iris", "skin", "lung"]},
        "Which is a bone?\nA. femur\nB. iris\nC. skin\nD. lung\nAnswer:", [" A", " D"], 0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("records")
    for path, record, *_ in RECORDS.values():
        file = root / f"{path}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        other = record | {"subject": "virology"} if "subject" in record else record
        file.write_text("".join(json.dumps(each) + "\n" for each in ([record] * 3 + [other])))
    return root


def requests_of(task: str) -> tuple[list[tuple[str, str]], list[Any]]:
    """(context, continuation) of every request of the first record, and the gold labels of all."""
    loaded: Mapping[str, Any] = task_manager().load([task])["tasks"]
    made = loaded[task]
    made.set_config("num_fewshot", 0)
    made.build_all_requests(rank=0, world_size=1)
    gold = [made.doc_to_target(doc) for doc in made.eval_docs]
    return [each.args for each in made.instances], gold


@pytest.mark.parametrize("task", list(RECORDS))
def test_prompts_and_gold_labels_are_the_harness_own(task: str, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, prompt, continuations, gold = RECORDS[task]
    with local_data(records):
        ours = requests_of(task)
    assert any(context.endswith(prompt) for context, _ in ours[0])
    for continuation in continuations:
        assert any(text == continuation for _, text in ours[0])
    assert {str(label) for label in ours[1]} == {str(gold)}
    assert len(ours[1]) == (3 if task == "mmlu_anatomy" else 4)  # one record is of another subject

    import datasets

    hub_id, split = path.rsplit("/", 2)[0], path.rsplit("/", 1)[1]

    def load_dataset(path: str, name: str | None = None, **kwargs: object) -> datasets.DatasetDict:
        assert path == hub_id
        whole = local_dataset(records, path, name)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), whole[split]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert requests_of(task) == ours


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


def test_models_are_measured_and_missing_data_is_said(
    world: World, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU takes a fixed number of rows at once: the harness's search for one would leave every task out here."""
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM._detect_batch_size", None)
    source = str(world.folder / "source")
    options = ("--data-dir", records, "--device", "cpu", "--json", tmp_path / "out.json")
    assert call("eval", source, "--tasks", "boolq,openbookqa,copa", *options) == 2
    streams = capsys.readouterr()
    assert "copa is left out" in streams.err
    table = streams.out.splitlines()
    assert table[0] == "| model | BoolQ | OBQA | copa | Avg of 7 |"
    assert "boolq v2.0" in streams.out
    found = json.loads((tmp_path / "out.json").read_text())[source]
    assert found["records"] == {"boolq": 4, "openbookqa": 4}
    assert found["results"]["boolq"]["acc,none"] in (0.0, 1.0)  # four times the same record
    assert any(line.startswith("| paper: SmolLM-135M") for line in table)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tasks", "hellaswagg"], "did you mean hellaswag?"),
        (["--limit", "3", "--sample", "3"], "--limit takes the first records and --sample draws some of all: give one"),
        (["--batch-size", "0"], "neither auto nor a positive number"),
        (["--tasks", "piqa", "--data-dir", "/nowhere"], "is no folder"),
        (["--tasks", "ai2_arc", "--data-dir", "RECORDS"], "no figure of its own; name the tasks in it one by one"),
    ],
)
def test_bad_requests(
    world: World, records: Path, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(records) if each == "RECORDS" else each for each in argv]
    assert call("eval", world.folder / "source", *argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_path_that_leads_nowhere_is_refused_before_the_harness_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "check_tasks", lambda request: pytest.fail("the harness was loaded"))
    assert call("eval", "/nowhere/x") == 2
    assert "model '/nowhere/x' is neither a folder nor a hub id" in capsys.readouterr().err


def test_a_damaged_model_and_a_damaged_record_cost_nothing_else(
    world: World, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mute, torn, source = tmp_path / "mute", tmp_path / "torn", world.folder / "source"
    tiny_model("llama-gqa").save_pretrained(mute)  # no tokenizer
    shutil.copytree(source, torn)
    (torn / "model.safetensors").write_bytes(b"torn")
    shutil.copytree(records, tmp_path / "records")
    file = tmp_path / "records/allenai/openbookqa/main/test.jsonl"
    file.write_text(json.dumps({"question_stem": "A small model is", "answerKey": "A"}) + "\n")  # no choices
    out = tmp_path / "out.json"
    options = ("--tasks", "openbookqa,boolq", "--data-dir", tmp_path / "records", "--batch-size", "2", "--json", out)
    assert call("eval", mute, source, torn, *options, "--device", "cpu") == 2
    streams = capsys.readouterr()
    assert f"{mute} is left out: cannot load a tokenizer" in streams.err
    assert f"{torn} is left out: cannot load the weights" in streams.err
    assert f"see whether every record of {file} has the hub's fields" in streams.err
    last = streams.err.strip().splitlines()[-1]
    assert last == f"error: left out: {mute}, {torn}, openbookqa (reasons above); all the rest is done"
    assert [line.split(" | ")[0] for line in streams.out.splitlines() if "source" in line] == [f"| {source}"]
    assert json.loads(out.read_text())[str(source)]["records"] == {"boolq": 4}


def test_nothing_to_measure_is_said(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path)
    assert call("eval", tmp_path, "--tasks", "boolq") == 2
    streams = capsys.readouterr()
    assert "cannot load a tokenizer" in streams.err
    assert not streams.out


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a/b/default").mkdir(parents=True)
    (tmp_path / "a/b/default/test.jsonl").write_text('{"x": 1}\n{"x"')
    with pytest.raises(UsageError, match="cannot be read as JSON lines"):
        local_dataset(tmp_path, "a/b", None)
    with pytest.raises(UsageError, match="has no records"):
        local_dataset(tmp_path, "a/c", None)


def test_an_answer_longer_than_the_model_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def _loglikelihood_tokens(**_: object) -> None:
        raise AssertionError  # as the harness's function of this name does

    def another(**_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("lm_eval.simple_evaluate", _loglikelihood_tokens)
    with pytest.raises(UsageError, match="longer than the model's 64 positions"):
        _evaluate_task(SimpleNamespace(max_length=64), "piqa", EvalRequest(), None)
    monkeypatch.setattr("lm_eval.simple_evaluate", another)
    with pytest.raises(AssertionError):
        _evaluate_task(SimpleNamespace(max_length=64), "piqa", EvalRequest(), None)
