"""Rows are cached by content, made once, and never half made."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.corpus_samples import LENGTH, STORIES, stream_of, tokens_in, write_jsonl
from efficientllm import cache, files
from efficientllm.cache import file_digest
from efficientllm.data import encoding, making


def test_a_second_call_tokenises_nothing_and_a_change_does(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    tokenise = encoding.tokenise
    monkeypatch.setattr(making, "tokenise", lambda *args: calls.append(args[-1]) or tokenise(*args))
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
    load(tmp_path / "moved.jsonl", validation=0.3)
    assert len(calls) == 4


def test_a_digest_is_remembered_only_while_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


@pytest.mark.parametrize("moment", ["tokenise", "cut", "flush"])
def test_killed_half_way_leaves_nothing_wrong(
    moment: str, tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    place = files if moment == "flush" else making  # flush: all is written, and about to get its name
    act = getattr(place, moment)

    def die(*args: Any) -> None:
        if moment != "flush":
            act(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(place, moment, die)
        child = in_child(lambda: load(path))
        child.join()
    assert child.exitcode == -signal.SIGKILL
    caches = tmp_path / "cache" / "corpora"
    assert [path.name for path in caches.iterdir() if "partial" in path.name]
    (train,), (held,) = load(path)
    assert train.tokens + held.tokens == len(stream_of(STORIES))
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
