import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from efficientllm.reporting.model_card import write_model_card

RECIPE = """\
source: /home/somebody/my models/big
data:
  train: [/data/private/books/train-*.parquet, ../shared/more.jsonl]
  note: "```"
run: {dir: ~/runs/books, windows: 'C:\\somewhere\\else'}
"""


def facts(**changes: Any) -> dict[str, Any]:
    base = {
        "source": {
            "path": "HuggingFaceTB/SmolLM-1.7B",
            "parameters": 1_711_376_384,
            "widths": {"layers": 24, "hidden": 2048, "heads": 32, "kv_heads": 32, "intermediate": 8192},
            "validation_loss": 2.5,
        },
        "result": {
            "path": "runs/x/model",
            "parameters": 469_123_456,
            "widths": {"layers": 24, "hidden": 1152, "heads": 19, "kv_heads": 19, "intermediate": 3008},
            "validation_loss": 2.75,
        },
        "tokens": 60_000_000,
        "events": 4321,
        "compactions": 27,
        "seconds": 9000.0,
        "efficientllm": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "recipe": RECIPE,
    }
    return base | changes


def parts(path: Path) -> tuple[dict[str, Any], str]:
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_of_a_hub_model(tmp_path: Path) -> None:
    front, body = parts(write_model_card(tmp_path / "model", facts()))
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["efficientllm", "pruned"]
    assert front["base_model"] == "HuggingFaceTB/SmolLM-1.7B"
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", body, re.MULTILINE))
    assert rows["parameters"] == "1,711,376,384 | 469,123,456 (27.4%)"
    assert rows["hidden size"] == "2048 | 1152"
    assert rows["validation loss"] == "2.500 | 2.750"
    assert rows["perplexity"] == f"{math.exp(2.5):.3f} | {math.exp(2.75):.3f}"
    assert "0.250 nats per token worse" in body
    assert "60M training tokens, 4321 pruning events and 27 compactions in 2.5 hours" in body
    assert "{" not in re.sub(r"(?s)````yaml.*?````", "", body)  # no field was left unfilled


@pytest.mark.parametrize(("before", "after"), [(None, 300), (320, None), (320, 300)])
def test_losses_of_other_tokens_compare_in_bits_per_byte_or_not_at_all(
    tmp_path: Path, before: int | None, after: int | None
) -> None:
    """A run that resumes one without vocab, or the other way round, does not know its source in bits per byte."""
    given = facts()
    for name, tokens, bits in (("source", before, 1.5), ("result", after, 1.25)):
        given[name] |= {} if tokens is None else {"vocabulary": tokens, "validation_bits_per_byte": bits}
    body = write_model_card(tmp_path / "model", given).read_text()
    assert "nats per token better" not in body
    assert "nats per token worse" not in body
    both = before is not None and after is not None
    assert ("their losses do not compare" in body) != both
    assert ("0.250 bits per byte better than the source, each on rows of its own tokens" in body) == both
    assert ("| tokens of the vocabulary |" in body) == (after is not None)


def test_no_folder_of_this_machine_is_published(tmp_path: Path) -> None:
    local = facts()["source"] | {"path": str(tmp_path / "secret" / "big-model")}
    front, body = parts(write_model_card(tmp_path, facts(source=local)))
    assert "base_model" not in front
    assert "`big-model`" in body
    recipe = yaml.safe_load(re.search(r"(?s)\n````yaml\n(.*?)\n````\n", body)[1])  # type: ignore[index]
    assert recipe == {
        "source": "big",
        "data": {"train": ["train-*.parquet", "../shared/more.jsonl"], "note": "```"},
        "run": {"dir": "books", "windows": "else"},
    }
    for leak in (str(tmp_path), "secret", "somebody", "private", "somewhere"):
        assert leak not in body


def test_an_existing_folder_that_looks_like_a_hub_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    front, _ = parts(write_model_card(tmp_path, facts(source=facts()["source"] | {"path": "models/small"})))
    assert "base_model" not in front


@pytest.mark.parametrize(
    ("loss", "shown", "said"),
    [
        (None, "not measured", "No validation text was given"),
        (math.nan, "not finite", "diverged"),
        (math.inf, "not finite", "diverged"),
        (2.25, "2.250", "0.250 nats per token better"),
        (5000.0, "5000", "worse"),
    ],
)
def test_missing_or_broken_losses_are_said_plainly(tmp_path: Path, loss: float | None, shown: str, said: str) -> None:
    changed = facts()["result"] | {"validation_loss": loss}
    _, body = parts(write_model_card(tmp_path, facts(result=changed)))
    assert f"| validation loss | 2.500 | {shown} |" in body
    assert (f"| perplexity | 12.182 | {shown} |" in body) == shown.startswith("not ")
    assert said in body


def test_the_loading_example_is_plain_transformers(tmp_path: Path) -> None:
    _, body = parts(write_model_card(tmp_path, facts()))
    code = re.search(r"(?s)```python\n(.*?)```", body)
    assert code is not None
    compile(code[1], "card", "exec")
    assert "trust_remote_code" not in body


@pytest.mark.parametrize(("init", "said"), [("pretrained", "trained on"), ("random", "from scratch")])
def test_what_was_not_pruned_is_not_called_pruned(tmp_path: Path, init: str, said: str) -> None:
    given = facts()
    given["source"] |= {"init": init}
    given["result"] |= {"parameters": given["source"]["parameters"]}
    front, body = parts(write_model_card(tmp_path, given))
    assert said in body
    assert "Nothing was pruned" in " ".join(body.split())
    assert front["tags"] == ["efficientllm"]
    assert "smaller than its source" not in body
    assert ("inherits" in body) == (init == "pretrained")


def test_a_source_of_the_disk_is_never_published_as_the_hub_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the folder has gone since, or the card is written from another one."""
    monkeypatch.chdir(tmp_path)
    recipe = "data: {train: [{path: data/books, weight: 3.0}, {path: org/wiki}], validation: [{path: held/out.jsonl}]}"
    source = facts()["source"] | {"path": "models/mine", "on_disk": ["models/mine", "data/books", "held/out.jsonl"]}
    front, body = parts(write_model_card(tmp_path, facts(source=source, recipe=recipe)))
    assert "base_model" not in front
    assert "https://huggingface.co/" not in body
    assert front["datasets"] == ["org/wiki"]
    assert "Trained on `books` (75%) and `org/wiki` (25%); validated on `out.jsonl`." in body
    hub = source | {"on_disk": []}
    (tmp_path / "models" / "mine").mkdir(parents=True)
    front, _ = parts(write_model_card(tmp_path, facts(source=hub, recipe="data: {train: notes.txt}")))
    assert front["base_model"] == "models/mine"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("data: {train: /a/notes.txt}", "Trained on `notes.txt`; validated on documents of it that were held out."),
        (
            "data: {train: [{path: 'C:\\x\\a.txt'}, {path: 'o/d:en:train'}, b.txt]}",
            "`a.txt` (33%), `o/d` (33%) and `b.txt`",
        ),
        ("a: 1", "transformers 5.23.0."),
    ],
)
def test_the_text_is_named_in_plain_words(tmp_path: Path, recipe: str, said: str) -> None:
    assert said in parts(write_model_card(tmp_path, facts(recipe=recipe)))[1]


def test_an_evaluation_says_how_it_was_made(tmp_path: Path) -> None:
    values = {"acc,none": 0.625, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": math.nan}
    results = {"results": {"boolq": values}, "harness": "0.4.13", "limit": 40, "num_fewshot": 0}
    _, body = parts(write_model_card(tmp_path, facts(evaluation=results)))
    assert "| boolq | acc | 0.6250 | 0.1000 |" in body
    assert "| boolq | acc_norm | 0.5000 |  |" in body
    way = "lm-evaluation-harness 0.4.13; zero-shot; only the first 40 records of each task"
    assert f"Measured with `efficientllm eval` ({way}):" in body
    _, body = parts(write_model_card(tmp_path, facts(evaluation=results | {"limit": None})))
    assert "; all records)" in body
