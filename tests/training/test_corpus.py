"""From files to rows: every format, no token lost, cached by content, nothing half made, bad input named."""

from __future__ import annotations

import errno
import glob
import gzip
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from efficientllm.config import DataConfig
from efficientllm.errors import UsageError
from efficientllm.training import corpus, rows, sources
from efficientllm.training.cache import file_digest
from efficientllm.training.corpus import Corpus, load_corpora

EOS = "<|endoftext|>"
LENGTH = 16


def story(number: int) -> str:
    """A text of its own, of 1 to about 120 tokens, with letters beyond ASCII and line ends."""
    return f"Zo\u00eb met fox {number}." + "\nThe fox ran \u2014 and ran." * (number * number % 13)


STORIES = [story(number) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(STORIES, vocab_size=300, special_tokens=[EOS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token=EOS)


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[list[Corpus], list[Corpus]]]:
    """Loads a path, or a list of sources, into a cache of this test's own. `vocab_size` and `say` as in load_corpora."""

    def load(train: Any, vocab_size: int | None = None, say: Any = None, **data: Any) -> Any:
        train = str(train) if isinstance(train, Path) else train
        settings = {"train": train, "sequence_length": LENGTH, "cache_dir": str(tmp_path / "cache"), "workers": 1}
        config = DataConfig(**(settings | data))
        return load_corpora(config, tokenizer, vocab_size=vocab_size, on_progress=say)

    return load


def write_jsonl(path: Path, texts: list[str] = STORIES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stream_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]


def tokens_in(part: Corpus) -> list[int]:
    return part.take(range(len(part))).flatten().tolist()


def words_in(part: Corpus) -> set[int]:
    return set(map(tuple, part.take(range(len(part))).tolist()))


def pack_zstd(path: Path) -> None:
    with pa.CompressedOutputStream(str(path) + ".zst", "zstd") as packed:
        packed.write(path.read_bytes())
    path.unlink()


def pack_gzip(path: Path) -> None:
    Path(str(path) + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def make_parquet(folder: Path) -> str:
    table = pa.table({"id": range(60), "text": STORIES})
    pq.write_table(table.slice(0, 25), folder / "a [1].parquet", row_group_size=7)
    pq.write_table(table.slice(25).cast(pa.schema({"id": pa.float64(), "text": pa.string()})), folder / "b.parquet")
    return glob.escape(str(folder)) + "/[ab]*.parquet"


def make_jsonl(folder: Path) -> str:
    """Metadata that differs from record to record and from file to file, blank lines, an empty file, a BOM."""
    lines = [{"text": text, "meta": [number, "x", None][number % 3]} for number, text in enumerate(STORIES)]
    (folder / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines[:25]))
    (folder / "b.jsonl").write_text("")
    (folder / "c.jsonl").write_text("\n".join(json.dumps({**line, "url": 1}) for line in lines[25:]))
    return glob.escape(str(folder)) + "/*.jsonl"


def make_json_array(folder: Path) -> str:
    (folder / "all.json").write_text(json.dumps([{"text": text} for text in STORIES], indent=1))
    return str(folder / "all.json")


def make_packed(pack: Callable[[Path], None]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        pack(write_jsonl(folder / "a.jsonl"))
        return str(folder)

    return make


def make_txt(folder: Path) -> str:
    for number, text in enumerate(STORIES):
        (folder / f"part-{number // 20}").mkdir(exist_ok=True)
        (folder / f"part-{number // 20}" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    (folder / ".hidden.jsonl").write_text("not data")
    return str(folder)


def make_saved(folder: Path) -> str:
    datasets.Dataset.from_dict({"text": STORIES, "id": range(60)}).save_to_disk(folder / "saved", num_shards=2)
    return str(folder / "saved")


def make_saved_splits(folder: Path) -> str:
    splits = {
        "test": datasets.Dataset.from_dict({"text": ["x"]}),
        "train": datasets.Dataset.from_dict({"text": STORIES}),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return str(folder / "saved")


MAKERS = [make_parquet, make_jsonl, make_json_array, make_packed(pack_gzip), make_packed(pack_zstd)]
MAKERS += [make_txt, make_saved, make_saved_splits]
NAMES = ["parquet", "jsonl", "json array", "gz", "zst", "txt", "saved", "saved splits"]


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_every_format_gives_the_documents_end_to_end(
    make: Callable[[Path], str], tmp_path: Path, load: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "data [1]"  # a name that looks like a glob
    folder.mkdir()
    (train,), (held,) = load(make(folder), validation=str(write_jsonl(tmp_path / "held.jsonl", STORIES[:9])))
    expected = stream_of(tokenizer, STORIES)
    assert (train.documents, train.tokens) == (60, len(expected))
    assert len(train) == len(expected) // LENGTH
    assert tokens_in(train) == expected[: len(train) * LENGTH]
    assert tokens_in(held) == stream_of(tokenizer, STORIES[:9])[: len(held) * LENGTH]
    assert train.rows.features == datasets.Features({"input_ids": datasets.Sequence(datasets.Value("uint16"), LENGTH)})


def test_take_reads_any_rows_in_any_order(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_WRITE_TOKENS", 5 * LENGTH)  # many chunks in the file
    (train,), _ = load(write_jsonl(tmp_path / "a.jsonl"))
    assert len(train.rows.data.column("input_ids").chunks) > 10
    everything = torch.tensor(train.rows["input_ids"][:])
    indices = np.random.default_rng(0).integers(0, len(train), 50)
    taken = train.take(indices.tolist())
    assert taken.dtype == torch.int64
    assert torch.equal(taken, everything[indices])
    assert train.take([]).shape == (0, LENGTH)
    for outside in (-1, len(train)):
        with pytest.raises(IndexError):
            train.take([0, outside])


def test_processes_and_pieces_change_nothing(
    tmp_path: Path, load: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_jsonl(tmp_path / "data" / f"{number}.jsonl", STORIES[number * 20 : number * 20 + 20])
    for module, limit, value in [(rows, "_PROCESS_BYTES", 100), (sources, "_PROCESS_BYTES", 100)]:
        monkeypatch.setattr(module, limit, value)
    monkeypatch.setattr(rows, "_GROUP_CHARS", 300)
    monkeypatch.setattr(rows, "_BATCH_BYTES", 1000)
    (train,), _ = load(tmp_path / "data", workers=2, validation=str(tmp_path / "data" / "1.jsonl"))
    assert tokens_in(train) == stream_of(tokenizer, STORIES)[: len(train) * LENGTH]


def test_long_texts_are_cut_where_words_end() -> None:
    text = "one two\nthree four\nfive" + "x" * 40
    assert list(rows.pieces(text, 12)) == ["one two\n", "three four\n", "five" + "x" * 8, "x" * 12, "x" * 12, "x" * 8]
    assert list(rows.pieces("one two three", 8)) == ["one two", " three"]
    assert list(rows.pieces("short", 5)) == ["short"]


def test_a_second_call_tokenises_nothing_and_a_change_does(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    tokenise = rows.tokenise
    monkeypatch.setattr(corpus, "tokenise", lambda *args: calls.append(args[-1]) or tokenise(*args))
    path = write_jsonl(tmp_path / "a.jsonl")
    (first,), (first_held,) = load(path)
    (again,), (again_held,) = load(path)
    path.rename(tmp_path / "moved.jsonl")  # the content counts, not the name
    (moved,), _ = load(tmp_path / "moved.jsonl")
    assert len(calls) == 1
    assert tokens_in(first) == tokens_in(again) == tokens_in(moved)
    assert tokens_in(first_held) == tokens_in(again_held)
    text = (tmp_path / "moved.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(text.replace("fox 31", "fax 31"))  # the same size
    (changed,), _ = load(tmp_path / "moved.jsonl")
    assert len(calls) == 2
    assert tokens_in(changed) != tokens_in(first)
    load(tmp_path / "moved.jsonl", sequence_length=LENGTH + 1)
    load(tmp_path / "moved.jsonl", validation_fraction=0.3)
    assert len(calls) == 4


def test_a_digest_is_remembered_only_while_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficientllm.training import cache

    file, memory = tmp_path / "file", tmp_path / "memory"
    file.write_text("one")
    first = file_digest(file, memory)
    assert not memory.exists()  # just written: too fresh to trust its stamp
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1.0)
    assert file_digest(file, memory) == first
    (note,) = memory.iterdir()
    note.write_text("f" * 64)
    assert file_digest(file, memory) == "f" * 64  # remembered
    stat = file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a disguised change
    assert file_digest(file, memory) not in ("f" * 64, first)


def test_a_damaged_cache_is_made_again(tmp_path: Path, load: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    (before,), _ = load(path)
    expected = tokens_in(before)
    (file,) = (tmp_path / "cache").rglob("train.arrow")
    os.truncate(file, file.stat().st_size // 2)
    (after,), _ = load(path)
    assert tokens_in(after) == expected


def in_child(work: Callable[[], None]) -> multiprocessing.Process:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


@pytest.mark.parametrize("moment", ["tokenise", "cut", "publish"])
def test_killed_half_way_leaves_nothing_wrong(
    moment: str, tmp_path: Path, load: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    act = getattr(corpus, moment)

    def die(*args: Any) -> None:
        if moment != "publish":
            act(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, moment, die)
        child = in_child(lambda: load(path))
        child.join()
    assert child.exitcode == -signal.SIGKILL
    caches = tmp_path / "cache" / "corpora"
    assert [path.name for path in caches.iterdir() if "partial" in path.name]
    (train,), (held,) = load(path)
    assert train.tokens + held.tokens == len(stream_of(tokenizer, STORIES))
    assert not [path.name for path in caches.iterdir() if "partial" in path.name]


def test_two_processes_at_once_make_it_once(tmp_path: Path, load: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    heard = [tmp_path / "one", tmp_path / "two"]

    def work(log: Path) -> None:
        lines: list[str] = []
        load(path, say=lines.append)
        log.write_text("\n".join(lines))

    children = [in_child(lambda log=log: work(log)) for log in heard]  # type: ignore[misc]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert sum("tokenising 60 documents" in log.read_text() for log in heard) == 1


def test_held_out_documents_are_chosen_by_their_text_and_never_trained_on(
    tmp_path: Path, load: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [story(number) for number in range(400)]
    (train,), (held,) = load(write_jsonl(tmp_path / "a.jsonl", texts), validation_fraction=0.1, sequence_length=8)
    assert train.documents + held.documents == 400
    assert 20 < held.documents < 70
    expected = {tuple(tokenizer.encode(text)) for text in texts}
    documents = [split(tokens_in(part), tokenizer.eos_token_id) for part in (train, held)]
    assert documents[0] | documents[1] <= expected
    assert not documents[0] & documents[1]
    assert len(documents[0] | documents[1]) >= 398  # all but those in the two partial rows

    more = [story(number) for number in range(400, 500)]
    (_,), (held_of_more,) = load(
        write_jsonl(tmp_path / "b.jsonl", more + texts[::-1]), validation_fraction=0.1, sequence_length=8
    )
    still_held = split(tokens_in(held_of_more), tokenizer.eos_token_id)
    assert len(documents[1] - still_held) <= 1  # what more text comes, what was held out stays so


def split(tokens: list[int], end: int) -> set[tuple[int, ...]]:
    """The whole documents of a stream."""
    documents: list[tuple[int, ...]] = []
    first = 0
    for place, token in enumerate(tokens):
        if token == end:
            documents.append(tuple(tokens[first:place]))
            first = place + 1
    return set(documents)


def test_a_small_fraction_still_holds_out_a_row_of_documents(tmp_path: Path, load: Any) -> None:
    (train,), (held,) = load(write_jsonl(tmp_path / "a.jsonl"), validation_fraction=1e-9)
    assert len(held) >= 1
    assert held.tokens < train.tokens / 2
    assert train.documents + held.documents == 60


@pytest.mark.parametrize("copies", [1, 3])
def test_of_a_single_text_the_last_rows_are_held_out(
    copies: int, tmp_path: Path, load: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    (train,), (held,) = load(write_jsonl(tmp_path / "a.jsonl", ["\n".join(STORIES)] * copies), validation_fraction=0.1)
    expected = stream_of(tokenizer, ["\n".join(STORIES)] * copies)
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
    (train,), _ = load({"path": "org/stories", "name": "en", "split": "train[:50%]"})
    assert set(calls[0][:3]) == {"org/stories", "en", "train[:50%]"}
    assert not any(options.get("trust_remote_code") for *_, options in calls)
    assert train.name == "org/stories:en:train[:50%]"
    assert train.documents < 60


def test_odd_text_is_kept_and_empty_documents_are_not(tmp_path: Path, load: Any, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    texts = [*STORIES, "", None, "half a pair: \ud83d.", f"two{EOS}stories"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (train,), _ = load(path, validation=str(path))
    expected = stream_of(tokenizer, [*STORIES, "half a pair: ?.", "two", "stories"])
    assert tokens_in(train) == expected[: len(train) * LENGTH]
    assert train.documents == 62


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
    yield "split", {"path": str(folder / "mixed"), "split": "dev"}, "mixes kinds"
    local = write_jsonl(folder / "fine.jsonl")
    yield "local split", {"path": str(local), "split": "dev"}, "read from this machine, where name and split"
    (folder / "dict").mkdir()
    splits = {"path": make_saved_splits(folder / "dict"), "split": "dev"}
    yield "saved split", splits, "has no split 'dev'; set split to one of: test, train"
    pq.write_table(pa.table({"title": ["x"], "body": ["y"]}), folder / "columns.parquet")
    yield "column", str(folder / "columns.parquet"), "no column 'text', but title, body; set data.text_column"
    (folder / "columns.jsonl").write_text('{"text": "x"}\n{"title": "x", "body": "y"}\n')
    yield "json column", str(folder / "columns.jsonl"), "columns.jsonl, line 2: no column 'text', but title, body"
    pq.write_table(pa.table({"text": [[1], [2]]}), folder / "lists.parquet")
    yield "type", str(folder / "lists.parquet"), r"column 'text' holds list<.*>, not text; set data.text_column"
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


def test_bad_input_is_named_with_its_mend(tmp_path: Path, load: Any) -> None:
    for case, source, message in bad_inputs(tmp_path):
        with pytest.raises(UsageError) as caught:
            load(source)
        text = str(caught.value)
        assert re.search(message, text), f"{case}: {text}"
        assert "\n" not in text, case
        left = [path.name for path in (tmp_path / "cache").rglob("*partial*")]
        assert not left, case


def test_an_unknown_hub_id_is_named(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(sources, "load_dataset", absent)
    with pytest.raises(UsageError, match=r"'org/absent' is no path here, and .* failed \(no route\); mend the path"):
        load("org/absent")


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path: Path, load: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    for _ in range(2):  # tokenised now, and from the cache
        with pytest.raises(
            UsageError, match=r"gives token id \d+ for .*a.jsonl, but .* 100 entries: they do not belong"
        ):
            load(path, vocab_size=100)
    load(path, vocab_size=len(tokenizer))
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="the tokenizer has no EOS token .*name one as eos_token"):
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

    monkeypatch.setattr(corpus, place, full)
    with pytest.raises(UsageError, match=r"the disk of .*cache.* is full .*free some space, or set data.cache_dir"):
        load(write_jsonl(tmp_path / "a.jsonl"))
    assert not list((tmp_path / "cache").rglob("*partial*"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, load: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"the cache folder .*file.* cannot be written .*set data.cache_dir"):
        load(write_jsonl(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "file"))


def test_a_source_that_changes_while_it_is_read_is_not_cached(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    read = corpus.read

    def read_and_change(*args: Any) -> datasets.Dataset:
        texts = read(*args)
        write_jsonl(path, STORIES[1:])
        return texts

    monkeypatch.setattr(corpus, "read", read_and_change)
    with pytest.raises(UsageError, match=r"a.jsonl' changed while it was read; run again"):
        load(path)
