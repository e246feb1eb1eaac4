"""Bad input and misfortune: each is refused in one sentence that names the mend, and leaves nothing behind."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from data.corpus_samples import (
    LENGTH,
    STORIES,
    load_path,
    make_saved,
    make_saved_splits,
    small_tokenizer,
    write_jsonl,
)
from efficientllm.config import DataConfig
from efficientllm.data import encoding, making, sources
from efficientllm.data.corpus import load_corpora
from efficientllm.errors import UsageError


def corrupt(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 40] = b"?" * 40
    path.write_bytes(content)
    return path


def bad_inputs(folder: Path) -> Iterator[tuple[str, Any, str]]:
    """(case, source, what the message says)."""
    yield "glob", str(folder / "*.nothing"), r"no file matches the data path '.*\*\.nothing'.*mend the path"
    yield "path", str(folder / "absent.jsonl"), "'.*absent.jsonl' does not exist .*mend the path"
    yield "relative", "absent/file.jsonl", "'absent/file.jsonl' does not exist .*mend the path"
    yield "url", "https://x.org/a.parquet", "'https://x.org/a.parquet' does not exist .*mend the path"
    (folder / "notes.md").write_text("x")
    yield "ending", str(folder / "notes.md"), "notes.md' does not end like a data file .*rename it"
    (folder / "void").mkdir()
    yield "folder", str(folder / "void"), "void' holds no data file .*mend the path"
    write_jsonl(folder / "mixed" / "a.jsonl")
    (folder / "mixed" / "b.txt").write_text("x")
    yield "mixed", str(folder / "mixed"), "mixes kinds of files, such as .*a.jsonl and .*b.txt; name each"
    yield "split", "./mixed::dev", "'./mixed::dev' does not exist"
    write_jsonl(folder / "local" / "fine.jsonl")
    yield "local split", "local/fine.jsonl::dev", "read from this machine, where name and split .*; remove '::dev'"
    (folder / "dict").mkdir()
    make_saved_splits(folder / "dict")
    yield "saved split", "dict/saved::dev", "has no split 'dev'; choose one of: test, train"
    pq.write_table(pa.table({"title": ["x"], "body": ["y"]}), folder / "columns.parquet")
    yield "column", str(folder / "columns.parquet"), "no column 'text', but title, body; set text_column of that source"
    (folder / "columns.jsonl").write_text('{"text": "x"}\n{"title": "x", "body": "y"}\n')
    yield "json column", str(folder / "columns.jsonl"), "columns.jsonl, line 2: no column 'text', but title, body"
    pq.write_table(pa.table({"text": [[1], [2]]}), folder / "lists.parquet")
    yield (
        "type",
        str(folder / "lists.parquet"),
        r"column 'text' holds list<.*>, not text; set text_column of",
    )
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    yield "json type", str(folder / "number.jsonl"), "line 1: column 'text' holds int, not text"
    (folder / "strings.json").write_text('["a", "b"]')
    yield "json strings", str(folder / "strings.json"), "record 1 is no JSON object with a column 'text'"
    yield "empty", str(write_jsonl(folder / "empty.jsonl", [])), "holds no text: .*; add text"
    yield "empty texts", str(write_jsonl(folder / "blank.jsonl", ["", ""])), "holds no text: .*; add text"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "empty.parquet")
    yield "empty parquet", str(folder / "empty.parquet"), "holds no text: .*; add text"
    short = write_jsonl(folder / "short.jsonl", ["Hi."])
    yield "short", str(short), r"has \d tokens, fewer than one row of 16; add text or lower data.sequence_length"
    one_row = write_jsonl(folder / "row.jsonl", ["".join(map(chr, range(40, 60)))])
    yield "one row", str(one_row), r"has 21 tokens, fewer than two rows of 16, .*name data.validation"
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{"text": "y\n')
    yield "json", str(folder / "broken.jsonl"), "broken.jsonl, line 2: not valid JSON .*write one JSON object per line"
    (folder / "broken.parquet").write_bytes(b"PAR1 nothing")
    yield "parquet", str(folder / "broken.parquet"), "broken.parquet' cannot be read .*replace the file or leave it out"
    pq.write_table(pa.table({"text": STORIES}), folder / "page.parquet", compression="gzip")
    yield "parquet page", str(corrupt(folder / "page.parquet")), "page.parquet' cannot be read .*replace the file"
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "x" * 99}).encode())[:-9])
    yield "gz", str(folder / "cut.jsonl.gz"), "cut.jsonl.gz' cannot be read .*replace the file"
    (folder / "bad.jsonl.zst").write_bytes(b"nothing")
    yield "zst", str(folder / "bad.jsonl.zst"), "bad.jsonl.zst' cannot be read .*replace the file"
    (folder / "latin.txt").write_bytes("Zo\u00eb".encode("latin-1") * 9)
    yield "encoding", str(folder / "latin.txt"), "latin.txt' is not UTF-8 text .*convert it"
    (folder / "torn").mkdir()
    torn = Path(make_saved(folder / "torn"))
    for file in torn.glob("*.arrow"):
        os.truncate(file, 20)
    yield "saved", str(torn), "saved' cannot be read .*replace the file"


def test_bad_input_is_named_with_its_mend(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for case, source, message in bad_inputs(tmp_path):
        with pytest.raises(UsageError) as caught:
            load(source)
        text = str(caught.value)
        assert re.search(message, text), f"{case}: {text}"
        assert "\n" not in text, case
        left = [path.name for path in (tmp_path / "cache").rglob("*partial*")]
        assert not left, case


def test_an_unknown_hub_id_and_a_disk_too_small_for_one_are_named(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(sources, "load_dataset", absent)
    with pytest.raises(UsageError, match=r"'org/absent' is no path here, and .* failed \(no route\); mend the path"):
        load("org/absent")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "load_dataset", full)
    with pytest.raises(UsageError, match=r"the disk is full while 'org/large' is fetched .*; free .*, or set HF_HOME"):
        load("org/large")


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path: Path, load: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    for _ in range(2):  # tokenised now, and from the cache
        with pytest.raises(UsageError, match=r"gives token id \d+ for .*a.jsonl, but .* 100 entries: they do not"):
            load(path, vocab_size=100)
    load(path, vocab_size=len(small_tokenizer()))
    without = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer().backend_tokenizer)
    with pytest.raises(UsageError, match=r"the tokenizer has no EOS token .*name one as eos_token"):
        load_corpora(DataConfig(train=str(path), sequence_length=LENGTH), without)


@pytest.mark.parametrize("place", ["read", "tokenise", "cut"])
def test_a_full_disk_is_named_and_cleared(
    place: str, tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("while writing") from error

    monkeypatch.setattr(making, place, full)
    with pytest.raises(UsageError, match=r"the disk of .*cache.* is full .*free some space, or set data.cache_dir"):
        load(write_jsonl(tmp_path / "a.jsonl"))
    assert not list((tmp_path / "cache").rglob("*partial*"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"the cache folder .*file.* cannot be written .*set data.cache_dir"):
        load_path(tmp_path / "file", write_jsonl(tmp_path / "a.jsonl"))


def test_a_source_that_changes_while_it_is_read_is_not_cached(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    read = making.read

    def read_and_change(*args: Any) -> datasets.Dataset:
        texts = read(*args)
        write_jsonl(path, STORIES[1:])
        return texts

    monkeypatch.setattr(making, "read", read_and_change)
    with pytest.raises(UsageError, match=r"a.jsonl' changed while it was read; run again"):
        load(path)


def test_a_bad_record_is_named_by_worker_processes_too(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PROCESS_BYTES", 10)
    for name in "abc":
        write_jsonl(tmp_path / "data" / f"{name}.jsonl")
    (tmp_path / "data" / "d.jsonl").write_text('{"text": "x"}\n\n{"text": 3}\n')
    with pytest.raises(UsageError, match=r"d.jsonl, line 3: column 'text' holds int, not text"):
        load(tmp_path / "data", workers=2)


def test_a_disk_that_worker_processes_find_full_is_named(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoding, "_PROCESS_BYTES", 100)
    monkeypatch.setattr(encoding, "encode", full)
    with pytest.raises(UsageError, match=r"the disk of .*cache.* is full"):
        load(write_jsonl(tmp_path / "a.jsonl"), workers=2)
