"""Corpora of token ids: the rows of the same documents as text, read from the files as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.corpus_samples import (
    LENGTH,
    STORIES,
    documents_in,
    documents_of,
    small_tokenizer,
    tokens_in,
    write_jsonl,
    write_megatron,
)
from efficientllm.data.rows import Holdout
from efficientllm.data.sampling import BatchStream
from efficientllm.data.token_files import Shard
from efficientllm.data.tokenised import TokenRows, divide, index_of
from efficientllm.errors import UsageError


def make_megatron(folder: Path, dtype: str, *, ended: bool) -> str:
    """Two shards; of each third document several sequences, one of them empty."""
    documents = [
        [tokens[:3], [], tokens[3:]] if number % 3 == 0 else [tokens]
        for number, tokens in enumerate(documents_of(STORIES, ended=ended))
    ]
    write_megatron(folder / "a_text_document", documents[:25], dtype)
    write_megatron(folder / "b_text_document", [*documents[25:], []], dtype)
    return str(folder / "*.idx")


def make_parquet(folder: Path) -> str:
    table = pa.table({"id": range(60), "input_ids": documents_of(STORIES, ended=False)})
    pq.write_table(table.slice(0, 25), folder / "a.parquet", row_group_size=7)
    pq.write_table(table.slice(25), folder / "b.parquet")
    return str(folder)


def make_saved(folder: Path) -> str:
    ids = documents_of(STORIES, ended=True)
    ids[7:8] = [[], ids[7]]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(folder / "saved", num_shards=3)
    return str(folder / "saved")


MAKERS: dict[str, Callable[[Path], str]] = {
    "uint16": partial(make_megatron, dtype="uint16", ended=True),
    "int32, no EOS": partial(make_megatron, dtype="int32", ended=False),
    "int64": partial(make_megatron, dtype="int64", ended=True),
    "parquet": make_parquet,
    "saved": make_saved,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_same_rows_as_from_text(make: Callable[[Path], str], tmp_path: Path, load: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    other = str(write_jsonl(tmp_path / "held.jsonl", STORIES[:9]))
    (text,), _ = load(write_jsonl(tmp_path / "a.jsonl"), validation=other)
    for _ in range(2):  # made now, and from the cache
        (train,), _ = load(make(folder), validation=other)
        assert (len(train), train.documents, train.tokens) == (len(text), text.documents, text.tokens)
        assert tokens_in(train) == tokens_in(text)
    streams = [BatchStream([corpus], [1.0], 6, seed=3) for corpus in (text, train)]
    for step in (0, 7, 20):
        one, two = (stream.batch(step) for stream in streams)
        assert torch.equal(one, two)
        assert torch.equal(one[2:4], streams[1].batch(step, slice(2, 4)))  # a rank's share


def test_what_can_be_mapped_is_not_copied(tmp_path: Path, load: Any) -> None:
    documents = documents_of(STORIES * 20, ended=True)
    index = write_megatron(tmp_path / "a", [[each] for each in documents], "int32")
    load(index, validation=0.05)
    kept = sum(file.stat().st_size for file in (tmp_path / "cache" / "corpora").glob("*/*"))
    assert kept < 24 * len(documents) + 2000 < index.with_suffix(".bin").stat().st_size / 2


@pytest.mark.parametrize("named", ["a_text_document", "a_text_document.bin", "a_text_document.idx"])
def test_either_file_or_their_common_name_will_do(named: str, tmp_path: Path, load: Any) -> None:
    make_megatron(tmp_path, "uint16", ended=True)
    (train,), _ = load(str(tmp_path / named), validation=0.1)
    assert 0 < train.documents < 25


def test_documents_are_held_out_by_their_tokens_whatever_keeps_them(tmp_path: Path, load: Any) -> None:
    expected = {tuple(each) for each in documents_of(STORIES, ended=False)}
    found = []
    for number, make in enumerate(MAKERS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (train,), (held,) = load(make(folder), validation=0.2)
        assert train.documents + held.documents == 60
        assert documents_in(train) | documents_in(held) <= expected
        assert not documents_in(train) & documents_in(held)
        found.append((tokens_in(train), tokens_in(held)))
    assert all(each == found[0] for each in found)


def test_records_of_one_length_are_a_stream_that_was_cut(tmp_path: Path, load: Any) -> None:
    stream = [token for each in documents_of(STORIES, ended=True) for token in each]
    records = [stream[first : first + 20] for first in range(0, len(stream), 20)]
    pq.write_table(pa.table({"input_ids": records}), tmp_path / "a.parquet")
    (train,), _ = load(tmp_path / "a.parquet", validation=str(tmp_path / "a.parquet"))
    assert tokens_in(train) == stream[: len(train) * LENGTH]


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=7), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 90),
)
def test_rows_are_the_stream_cut_anywhere(documents: list[list[int]], length: int, shards: int, place: int) -> None:
    """0 is the EOS. Documents over several shards; the stream divided at any place: both sides as a slow join says."""
    parts = [documents[first::shards] for first in range(shards)]
    ends = [np.cumsum([0, *(len(each) for each in part)]) for part in parts]
    flat = [np.asarray([token for each in part for token in each], "<u2") for part in parts]
    made = [Shard(tokens, at[:-1], at[1:]) for tokens, at in zip(flat, ends, strict=True)]
    stream = [token for part in parts for each in part if each for token in (each if each[-1] == 0 else [*each, 0])]
    index = index_of(made, 0, whole=True)
    place = min(place, len(stream))
    if not stream:
        return
    before, after = divide(index, np.zeros(0, np.uint64), Holdout(position=place))
    for part, expected in ((index, stream), (before, stream[:place]), (after, stream[place:])):
        rows = TokenRows(flat, part, length, 0)
        assert len(rows) == len(expected) // length
        assert rows.take(np.arange(len(rows))).ravel().tolist() == expected[: len(rows) * length]


def bad_inputs(folder: Path) -> Iterator[tuple[str, Any, str]]:
    """(case, source, what the message says)."""
    ids = documents_of(STORIES, ended=True)
    whole = [[each] for each in ids]

    def megatron(name: str, dtype: str = "uint16", documents: Any = whole) -> Path:
        return write_megatron(folder / name, documents, dtype)

    megatron("alone").with_suffix(".bin").unlink()
    yield "no tokens", folder / "alone.idx", "alone.idx' has no 'alone.bin' beside it, with the tokens; copy both"
    short = megatron("short").with_suffix(".bin")
    short.write_bytes(short.read_bytes()[:-7])
    yield "short tokens", short, r"short.idx' does not match 'short.bin', which has [\d,]+ tokens; copy both anew"
    cut = megatron("cut")
    cut.write_bytes(cut.read_bytes()[:-8])
    yield "short index", cut, "cut.idx' is cut short or damaged: it says 60 sequences; copy it anew"
    swapped = megatron("swapped", documents=whole[1:])
    swapped.write_bytes(megatron("other").read_bytes())
    yield "another's index", swapped, "swapped.idx' does not match 'swapped.bin'"
    (folder / "old.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(40))
    (folder / "old.bin").write_bytes(b"")
    yield "old", folder / "old.idx", "old.idx' is of Megatron's older format, TNTIDX; preprocess the text anew"
    (folder / "foreign.idx").write_bytes(b"what is this")
    (folder / "foreign.bin").write_bytes(b"")
    yield "foreign", folder / "foreign.idx", "foreign.idx' is no index of Megatron's .bin files"
    yield "floats", megatron("floats", "float32"), "floats.idx' is of version 1 with tokens of type 7; version 1 with"
    yield (
        "range",
        megatron("range", documents=[[[1, 2, 999]]] * 30),
        "range.idx' holds token id 999, which the",
    )
    yield (
        "narrow",
        megatron("narrow", "uint8", [[[1, 2, 3]]] * 30),
        "narrow.idx' holds uint8, too narrow for .* 280",
    )
    yield "negative", megatron("negative", "int32", [[[1, -2]]] * 30), "holds token id -2, which the tokenizer does not"
    other = [[[token % 281 for token in range(seed, 200 + seed)]] for seed in range(9)]
    yield "another tokenizer", megatron("another", documents=other), r"tokenised again, keeps \d+% of its tokens: it is"
    yield "empty", megatron("empty", documents=[]), "empty.idx' holds no text"
    yield "short corpus", megatron("few", documents=whole[:1]), r"few.idx' has \d+ tokens, fewer than one row of 16"
    pq.write_table(pa.table({"input_ids": [[1, None, 2]]}), folder / "gaps.parquet")
    yield "gaps", folder / "gaps.parquet", r"column 'input_ids' has gaps \(null\) among the token ids"
    pq.write_table(pa.table({"input_ids": [[1, 70_000]]}), folder / "large.parquet")
    yield (
        "large",
        folder / "large.parquet",
        "large.parquet' has token ids from 1 to 70000, which the",
    )
    pq.write_table(pa.table({"input_ids": [[0.5]]}), folder / "real.parquet")
    yield "real", folder / "real.parquet", "column 'input_ids' holds list<.*double>, not text"
    yield "json", write_ids(folder / "ids.jsonl"), "line 1: column 'input_ids' holds list, not text"


def write_ids(path: Path) -> Path:
    path.write_text('{"input_ids": [1, 2]}\n')
    return path


def test_bad_input_is_named_with_its_mend(tmp_path: Path, load: Any) -> None:
    for case, source, message in bad_inputs(tmp_path):
        with pytest.raises(UsageError) as caught:
            load(source)
        text = str(caught.value)
        assert re.search(message, text), f"{case}: {text}"
        assert "\n" not in text, case
        assert not list((tmp_path / "cache").rglob("*partial*")), case


def test_a_model_with_a_smaller_vocabulary_is_named(tmp_path: Path, load: Any) -> None:
    make_megatron(tmp_path, "uint16", ended=True)
    with pytest.raises(UsageError, match=r"gives token id \d+ for .*, but the model's vocabulary has 100 entries"):
        load(str(tmp_path / "*.idx"), vocab_size=100)
    load(str(tmp_path / "*.idx"), vocab_size=len(small_tokenizer()))
