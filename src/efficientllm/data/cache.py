"""The cache on disk: folders that appear whole, made by one process at a time, and digests of what they are made of."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from efficientllm.data.documents import readable
from efficientllm.data.sources import disk_full
from efficientllm.errors import UsageError

_SETTLED_SECONDS = 2.0
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@contextmanager
def only_one(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """One process at a time makes a cache folder; others, such as the ranks of a run, call `waiting` and wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to make it in, removed in the end. To be called under the lock of only_one.

    Those that killed processes of this machine left behind are removed first.
    """
    prefix = f"{folder.name}.{socket.gethostname()}.partial-"
    for leftover in folder.parent.iterdir():
        if leftover.name.startswith(prefix):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(done: Path, folder: Path, whole: Callable[[Path], bool]) -> None:
    """Flushes a complete folder to the disk and gives it its name; one there that is not `whole` is replaced."""
    for path in (*done.iterdir(), done):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    try:
        done.rename(folder)
    except OSError:
        if not whole(folder):  # damaged; otherwise another machine was first, with the same content
            shutil.rmtree(folder)
            done.rename(folder)


def file_digest(path: Path, memory: Path) -> str:
    """sha256 of a file's bytes, all of them. Remembered under `memory` until the file's stat changes.

    A file that changed within the last seconds is not remembered, as the clock that stamps files may not tell a
    further change from that one.
    """
    with readable(path):
        stat = path.stat()
        stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        note = memory / hashlib.sha256(repr((str(path.resolve()), *stamp)).encode()).hexdigest()[:40]
        with suppress(OSError):
            digest = note.read_text()
            if len(digest) == 64:
                return digest
        settled = time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if settled:
        with suppress(OSError):  # only speed is lost
            memory.mkdir(parents=True, exist_ok=True)
            note.write_text(digest)
    return digest


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what a tokenizer does to a text, wherever it was loaded from."""
    digest = hashlib.sha256(repr((tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", False))).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        for left_over_from_last_call in ("truncation", "padding"):
            state.pop(left_over_from_last_call, None)
        digest.update(json.dumps(state, sort_keys=True).encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:  # one written in Python
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.name != "tokenizer_config.json":  # which names where it came from
                digest.update(path.read_bytes())
    digest.update(type(tokenizer).__name__.encode())
    return digest.hexdigest()


@contextmanager
def plain_errors(name: str, cache: Path) -> Iterator[None]:
    """Says in one sentence what a full or forbidden disk does to the cache."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if disk_full(error):
            raise UsageError(
                f"the disk of {cache} is full while '{name}' is tokenised; free some space, or set data.cache_dir "
                "to a folder on a larger disk"
            ) from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise UsageError(
                f"the cache folder {cache} cannot be written ({error.strerror}); set data.cache_dir to one that can"
            ) from error
        raise
