"""From files to rows: every format, no token lost; what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from data.corpus_samples import (
    EOS,
    LENGTH,
    STORIES,
    documents_in,
    make_json_array,
    make_jsonl,
    make_packed,
    make_parquet,
    make_saved,
    make_saved_splits,
    make_txt,
    pack_gzip,
    pack_zstd,
    small_tokenizer,
    story,
    stream_of,
    tokens_in,
    write_jsonl,
)
from efficientllm.data import documents, encoding, rows, sources
from efficientllm.data.corpus import Corpus


def arrow(part: Corpus) -> datasets.Dataset:
    assert isinstance(part.rows, rows.ArrowRows)
    return part.rows.dataset


MAKERS = [make_parquet, make_jsonl, make_json_array, make_packed(pack_gzip), make_packed(pack_zstd)]
MAKERS += [make_txt, make_saved, make_saved_splits]
NAMES = ["parquet", "jsonl", "json array", "gz", "zst", "txt", "saved", "saved splits"]


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_every_format_gives_the_documents_end_to_end(make: Callable[[Path], str], tmp_path: Path, load: Any) -> None:
    folder = tmp_path / "data [1]"  # a name that looks like a glob
    folder.mkdir()
    (train,), (held,) = load(make(folder), validation=str(write_jsonl(tmp_path / "held.jsonl", STORIES[:9])))
    expected = stream_of(STORIES)
    assert (train.documents, train.tokens) == (60, len(expected))
    assert len(train) == len(expected) // LENGTH
    assert tokens_in(train) == expected[: len(train) * LENGTH]
    assert tokens_in(held) == stream_of(STORIES[:9])[: len(held) * LENGTH]
    assert arrow(train).features == datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value("uint16"), LENGTH)}
    )


def test_who_only_validates_reads_nothing_else(tmp_path: Path, load: Any) -> None:
    """As for the samples of a report, when the cache is gone: the text to train on may be large, or not there."""
    held = str(write_jsonl(tmp_path / "held.jsonl", STORIES[:9]))
    train, (alone,) = load("nowhere.jsonl", validation=held, trains=False)
    assert not train
    _, (beside,) = load(write_jsonl(tmp_path / "train.jsonl"), validation=held)
    assert (alone.key, tokens_in(alone)) == (beside.key, tokens_in(beside))


def test_text_that_is_both_trained_and_validated_on_is_said(tmp_path: Path, load: Any) -> None:
    lines: list[str] = []
    same = str(write_jsonl(tmp_path / "same.jsonl"))
    load(same, validation=[same, str(write_jsonl(tmp_path / "held.jsonl", STORIES[:9]))], say=lines.append)
    assert [line for line in lines if line.endswith("seen")] == [
        f"{same} is both trained and validated on: its validation loss is of text that was seen"
    ]


def test_take_reads_any_rows_in_any_order(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_WRITE_TOKENS", 5 * LENGTH)  # many chunks in the file
    (train,), _ = load(write_jsonl(tmp_path / "a.jsonl"))
    assert len(arrow(train).data.column("input_ids").chunks) > 10
    everything = torch.tensor(arrow(train)["input_ids"][:])
    indices = np.random.default_rng(0).integers(0, len(train), 50)
    taken = train.take(indices.tolist())
    assert taken.dtype == torch.int64
    assert torch.equal(taken, everything[indices])
    assert train.take([]).shape == (0, LENGTH)
    for outside in (-1, len(train)):
        with pytest.raises(IndexError):
            train.take([0, outside])


def test_processes_and_pieces_change_nothing(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_jsonl(tmp_path / "data" / f"{number}.jsonl", STORIES[number * 20 : number * 20 + 20])
    for module, limit, value in [(encoding, "_PROCESS_BYTES", 100), (sources, "_PROCESS_BYTES", 100)]:
        monkeypatch.setattr(module, limit, value)
    monkeypatch.setattr(encoding, "_GROUP_CHARS", 300)
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 1000)
    monkeypatch.setattr(rows, "_WRITE_TOKENS", 3 * LENGTH + 5)
    (train,), _ = load(tmp_path / "data", workers=2, validation=str(tmp_path / "data" / "1.jsonl"))
    assert tokens_in(train) == stream_of(STORIES)[: len(train) * LENGTH]


def test_long_texts_are_cut_where_words_end() -> None:
    text = "one two\nthree four\nfive" + "x" * 40
    assert list(documents.pieces(text, 12)) == [
        "one two\n",
        "three four\n",
        "five" + "x" * 8,
        "x" * 12,
        "x" * 12,
        "x" * 8,
    ]
    assert list(documents.pieces("one two three", 8)) == ["one two", " three"]
    assert list(documents.pieces("short", 5)) == ["short"]


def test_held_out_documents_are_chosen_by_their_text_and_never_trained_on(tmp_path: Path, load: Any) -> None:
    texts = [story(number) for number in range(400)]
    (train,), (held,) = load(write_jsonl(tmp_path / "a.jsonl", texts), validation=0.1, sequence_length=8)
    assert train.documents + held.documents == 400
    assert 20 < held.documents < 70
    expected = {tuple(small_tokenizer().encode(text, add_special_tokens=False)) for text in texts}
    documents = [documents_in(part) for part in (train, held)]
    assert documents[0] | documents[1] <= expected
    assert not documents[0] & documents[1]
    assert len(documents[0] | documents[1]) >= 398  # all but those in the two partial rows

    more = [story(number) for number in range(400, 500)]
    (_,), (held_of_more,) = load(
        write_jsonl(tmp_path / "b.jsonl", more + texts[::-1]), validation=0.1, sequence_length=8
    )
    still_held = documents_in(held_of_more)
    assert len(documents[1] - still_held) <= 1  # what more text comes, what was held out stays so


def test_a_small_fraction_still_holds_out_a_row_of_documents(tmp_path: Path, load: Any) -> None:
    (train,), (held,) = load(write_jsonl(tmp_path / "a.jsonl"), validation=1e-9)
    assert len(held) >= 1
    assert held.tokens < train.tokens / 2
    assert train.documents + held.documents == 60


@pytest.mark.parametrize("copies", [1, 3])
def test_of_a_single_text_the_last_rows_are_held_out(copies: int, tmp_path: Path, load: Any) -> None:
    (train,), (held,) = load(write_jsonl(tmp_path / "a.jsonl", ["\n".join(STORIES)] * copies), validation=0.1)
    expected = stream_of(["\n".join(STORIES)] * copies)
    assert len(held) == round(0.1 * (len(expected) // LENGTH))
    assert tokens_in(train) + tokens_in(held) == expected[: (len(train) + len(held)) * LENGTH]
    assert len(expected) - (len(train) + len(held)) * LENGTH < LENGTH


def test_several_sources_keep_their_weights_and_columns(tmp_path: Path, load: Any) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in STORIES[:30]))
    one = {"path": str(write_jsonl(tmp_path / "a.jsonl")), "weight": 0.25}
    train, held = load([one, {"path": str(path), "text_column": "body"}])
    assert [part.weight for part in train] == [part.weight for part in held] == [0.25, 1.0]
    assert train[1].name == str(path)


def test_a_hub_id_is_read_from_the_hub_without_its_code(tmp_path: Path, load: Any, monkeypatch: Any) -> None:
    calls: list[tuple[Any, ...]] = []

    def from_hub(path: str, name: str | None = None, *, split: str, **options: Any) -> datasets.Dataset:
        calls.append((path, name, split, options))
        return datasets.load_from_disk(make_saved(tmp_path))

    monkeypatch.setattr(sources, "load_dataset", from_hub)
    (train,), _ = load("org/stories:en:train[:50%]")
    assert set(calls[0][:3]) == {"org/stories", "en", "train[:50%]"}
    assert not any(options.get("trust_remote_code") for *_, options in calls)
    assert train.name == "org/stories:en:train[:50%]"
    assert train.documents < 60


def test_odd_text_is_kept_and_empty_documents_are_not(tmp_path: Path, load: Any) -> None:
    path = tmp_path / "a.jsonl"
    texts = [*STORIES, "", None, "half a pair: \ud83d.", f"two{EOS}stories"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (train,), _ = load(path, validation=str(path))
    expected = stream_of([*STORIES, "half a pair: ?.", "two", "stories"])
    assert tokens_in(train) == expected[: len(train) * LENGTH]
    assert train.documents == 62
