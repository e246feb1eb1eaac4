"""The cache on disk: where it is, folders that appear whole and are made by one process at a time, digests of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from efficientllm.errors import UsageError

_SETTLED_SECONDS = 2.0


def cache_root(chosen: str | None = None) -> Path:
    """Where what is computed once is kept: `chosen`, $EFFICIENTLLM_CACHE, or the user's cache."""
    return Path(chosen or os.environ.get("EFFICIENTLLM_CACHE", "~/.cache/efficientllm")).expanduser()


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
    further change from that one. Raises UsageError for one that cannot be read.
    """
    try:
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
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read ({error}); replace the file or leave it out") from error
    if settled:
        with suppress(OSError):  # only speed is lost
            memory.mkdir(parents=True, exist_ok=True)
            note.write_text(digest)
    return digest
