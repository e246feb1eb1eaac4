"""Runs whose tokens fall: what is left of them, how they go on after a kill, and on two processes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import World, tiny_config, world_of
from efficientllm.checkpoint.store import checkpoints
from efficientllm.cli import main
from efficientllm.errors import UsageError
from efficientllm.export.subject import subject_of
from efficientllm.jobs.finish import result_line
from efficientllm.jobs.samples import write_samples
from efficientllm.jobs.vocabulary import check_goes_on
from efficientllm.models.space import build
from efficientllm.reporting.journal import read_journal
from processes import call, codes, run_and_die, same_weights, start, start_ranks

pytestmark = pytest.mark.slow

TYPES = ["attention", "attention_query", "ffn", "stem", "vocab"]
TEXTS = ["the model learns", "naïve 日本語 😀\x00\t  x", "strength brought the thread  \n\n0123456789"]


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world whose tokenizer knows many words that its text hardly has."""
    folder, chooser = tmp_path_factory.mktemp("rare"), random.Random(0)
    often = ["the", "model", "learns", "to", "write", "short", "words", "and", "prunes", "its", "own", "heads"]
    others = ["".join(chooser.choices("bcdfghst", k=2) + chooser.choices("aeiou", k=2)) * 2 for _ in range(300)]
    for name, documents, seldom in (("train", 3000, 0.0005), ("validation", 16, 0.0005), ("wide", 200, 0.5)):
        lines = []
        for _ in range(documents):
            begin = chooser.randrange(len(often))  # each word follows from the one before, which a body has to learn
            words = [often[(begin + place) % len(often)] for place in range(60)]
            words = [chooser.choice(others) if chooser.random() < seldom else word for word in words]
            lines.append(json.dumps({"text": " ".join(words)}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with world_of(folder, "wide.jsonl", 640) as made:
        yield made


@pytest.fixture(scope="module")
def shed(rare: World) -> Path:
    """The folder of a finished run, half of whose steps come before pruning."""
    assert call("prune", rare.write("shed", train=LONG, prune=PRUNE)) == 0
    return rare.folder / "runs" / "shed"


PRUNE = {"target": "60%", "types": TYPES, "start": "60%", "end": "80%"}
LONG = {"tokens": 40 * 256}


def test_tokens_fall_and_the_result_speaks_what_is_left(shed: Path) -> None:
    summary = json.loads((shed / "summary.json").read_text())
    source, result = summary["source"], summary["result"]
    assert source["vocabulary"] == 640
    assert result["vocabulary"] < 600
    assert 0.57 * source["parameters"] < result["parameters"] <= 0.6 * source["parameters"]
    model, tokenizer = (kind.from_pretrained(shed / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert len(tokenizer) == model.config.vocab_size == len(model.get_input_embeddings().weight) == result["vocabulary"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    falls = [line for line in read_journal(shed / "compactions.jsonl") if "vocabulary" in line]
    assert falls[0]["vocabulary"][0] == 640
    assert falls[-1]["vocabulary"][1] == result["vocabulary"]
    assert falls[0]["allocated_before"] > falls[0]["allocated_after"]
    lines = [line for line in read_journal(shed / "metrics.jsonl") if "validation_loss" in line]
    assert all(0 < line["validation_bits_per_byte"] < line["validation_loss"] for line in lines)
    assert (
        result["validation_bits_per_byte"] == lines[-1]["validation_bits_per_byte"] < source["validation_bits_per_byte"]
    )
    write_samples(shed, print)
    written = json.loads((shed / "samples.json").read_text())
    assert len(written) == 3
    assert all(each["prompt"] and each["source"] for each in written)
    assert all("prunes its own heads the model" in each["result"] for each in written)  # by its own tokenizer


def test_killed_and_resumed_is_bitwise_the_same(rare: World, shed: Path) -> None:
    """Killed before tokens fall, while they do, and after."""
    recipe = rare.write("killed", train=LONG, prune=PRUNE)
    folder, log = rare.folder / "runs" / "killed", recipe.with_suffix(".log")
    moments = [("training.loop.update", 10), ("jobs.vocabulary.shed", 1), ("training.loop.update", 10)]
    for function, number in moments:
        process = start(log, run_and_die, (["prune", str(recipe)], f"efficientllm.{function}", number))
        assert codes([process]) == [-signal.SIGKILL], log.read_text()[-3000:]
    assert call("prune", recipe) == 0
    assert same_weights(folder, shed)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (folder / "model" / name).read_bytes() == (shed / "model" / name).read_bytes()


def test_two_processes_take_the_same_tokens(rare: World, shed: Path) -> None:
    """And a run of one process goes on where theirs has left a checkpoint after the fall."""
    recipe = rare.write("two", train=LONG, prune=PRUNE, distributed={"shard": "full"})
    folder, log = rare.folder / "runs" / "two", recipe.with_suffix(".log")
    assert codes(start_ranks(2, log, main, ["prune", str(recipe)])) == [0, 0], log.read_text()[-3000:]
    own, other = (
        [line["vocabulary"] for line in read_journal(each / "compactions.jsonl") if "vocabulary" in line]
        for each in (folder, shed)
    )
    assert own == other
    assert (folder / "model" / "tokenizer.json").read_bytes() == (shed / "model" / "tokenizer.json").read_bytes()
    (folder / "summary.json").unlink()
    shutil.rmtree(checkpoints(folder / "checkpoints")[-1])
    assert call("prune", recipe) == 0
    assert json.loads((folder / "summary.json").read_text())["result"]["vocabulary"] == own[-1][1]


@pytest.mark.parametrize("mode", ["one-shot", "iterative"])
def test_at_rest(rare: World, mode: str) -> None:
    recipe = rare.write(
        mode, prune={"target": "60%", "types": TYPES, "mode": mode, "start": "60%", "end": None, "bound": None}
    )
    assert call("prune", recipe) == 0
    summary = json.loads((rare.folder / "runs" / mode / "summary.json").read_text())
    assert summary["target_reached"]
    assert summary["result"]["parameters"] > 0.55 * summary["source"]["parameters"]
    assert summary["result"]["vocabulary"] < 640


def test_a_rung_keeps_its_own_vocabulary(rare: World) -> None:
    """A snapshot is left with the tokens of its moment, and trains on with them; documents stay apart."""
    prune = PRUNE | {"ladder": ["80%"]}
    recipe = rare.write("ladder", train=LONG, prune=prune, data={"within_documents": True})
    assert call("prune", recipe) == 0
    summary = json.loads((rare.folder / "runs" / "ladder" / "summary.json").read_text())
    assert 0.57 < summary["result"]["parameters"] / summary["source"]["parameters"] <= 0.6
    (milestone,) = (rare.folder / "runs" / "ladder" / "ladder").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(milestone / "model")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(milestone / "model").config.vocab_size
    left = json.loads((milestone / "summary.json").read_text())
    assert left["vocabulary"] == len(tokenizer)
    assert 0 < left["validation_bits_per_byte"] < left["validation_loss"]
    facts = subject_of(milestone).facts
    assert facts is not None
    assert facts["result"]["vocabulary"] == len(tokenizer)
    assert call("continue", milestone) == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prune": {"types": ["vocab"]}}, "prune.types has vocab alone"),
        ({"prune": {"types": TYPES, "target": {"hidden": 32}}}, "prune.types has vocab, which has no width"),
        ({"prune": {"types": TYPES, "target": {"kv_cache": "60%"}, "cost": "kv-cache"}}, "kv-cache does not count"),
        ({"prune": {"types": TYPES, "saliency": {"vocab": "flap"}}}, "'vocab' is no pruning type here"),
        ({"prune": {"types": TYPES, "saliency": "magnitude"}}, "whose damage is in nats"),
        ({"prune": {"types": TYPES}, "distill": {}}, "a teacher speaks another vocabulary"),
        (
            {"prune": {"types": TYPES, "mode": "one-shot", "start": "95%", "end": None, "bound": None}},
            "prune.mode one-shot needs two batches after prune.start",
        ),
        ({"prune": {"types": TYPES}, "data": {"train": "TOKENS"}}, "holds tokens; leave vocab out"),
    ],
)
def test_bad_input_is_one_sentence(
    rare: World, sections: dict[str, dict[str, object]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if sections.get("data"):
        tokens, tokenizer = rare.folder / "tokens.parquet", AutoTokenizer.from_pretrained(rare.folder / "source")
        text = (rare.folder / "train.jsonl").read_text().splitlines()[:100]
        pq.write_table(
            pa.table({"input_ids": [tokenizer(json.loads(each)["text"])["input_ids"] for each in text]}), tokens
        )
        sections = sections | {"data": {"train": str(tokens)}}
    assert call("prune", rare.write("refused", **sections)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_its_result_is_written_as_gguf(shed: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    out = tmp_path / "shed.gguf"
    assert call("export", shed, "--to", "gguf", "--type", "f32", "--out", out) == 0
    reader = gguf.GGUFReader(out)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == json.loads((shed / "summary.json").read_text())["result"]["vocabulary"]
    merges = [merge.split(" ") for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    assert {left + right for left, right in merges} <= set(tokens)
    card = (shed / "model" / "README.md").read_text()
    assert "| tokens of the vocabulary | 640 |" in card
    assert "bits per byte better than the source" in card


def test_a_plan_counts_them(rare: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", rare.write("planned", train=LONG, prune=PRUNE)) == 0
    said = capsys.readouterr()
    assert "of 640 tokens from the first step on" in said.err + said.out
    assert "26.4" in said.out  # 60 % of the whole source


@pytest.mark.parametrize(
    ("family", "prune"),
    [
        ("llama-gqa", {"target": {"flops": "70%"}, "cost": "flops"}),
        ("qwen3-moe-gqa", {"target": "70%", "align": 8, "floors": {"intermediate": None}}),
    ],
)
def test_another_cost_and_experts(rare: World, family: str, prune: dict[str, object]) -> None:
    """An LM head of its own counts twice, in parameters; the default types are those of the source."""
    source = rare.folder / family
    build(tiny_config(family, vocab_size=640, tie_word_embeddings=False)).save_pretrained(source)
    for file in (rare.folder / "source").glob("tokenizer*"):
        shutil.copy(file, source / file.name)
    assert call("prune", rare.write(family, source=str(source), train=LONG, prune=PRUNE | prune)) == 0
    run = rare.folder / "runs" / family
    summary = json.loads((run / "summary.json").read_text())
    assert summary["target_reached"]
    assert summary["result"]["vocabulary"] < 640
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(run / "model"))


@pytest.mark.parametrize(
    ("content", "distill", "message"),
    [("tokens", None, "text encoded anew, but 'x' holds tokens; train on text"), ("text", 1, "leave out distill")],
)
def test_a_recipe_that_cannot_go_on_without_them_is_refused(
    rare: World, content: str, distill: int | None, message: str
) -> None:
    """Where tokens have fallen by another one, which this one resumes."""
    tokenizer = AutoTokenizer.from_pretrained(rare.folder / "source")
    corpora: Any = [SimpleNamespace(name="x", content=content)]
    job: Any = SimpleNamespace(tokenizer=tokenizer, training=corpora, recipe=SimpleNamespace(distill=distill))
    with pytest.raises(UsageError, match=message):
        check_goes_on(job)


def test_a_source_that_is_not_known_in_bits_per_byte_is_no_error() -> None:
    """Of a run that goes on from one without vocab."""
    known = {"parameters": 2000, "validation_loss": 2.0}
    summary = {"source": known, "result": known | {"validation_bits_per_byte": 1.5}}
    assert "bits per byte 1.5000 (source: 2K, not measured)" in result_line(summary)
