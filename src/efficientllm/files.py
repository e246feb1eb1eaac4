"""Files and folders that appear whole or not at all, JSON in them, and the lock that keeps other processes away."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from efficientllm.errors import UsageError

PARTIAL = ".partial-"
REPLACED = ".replaced-"


@contextmanager
def atomic_path(
    path: Path, *, folder: bool = True, alone: bool = True, keep: Callable[[Path], bool] = lambda there: False
) -> Iterator[Path]:
    """A temporary folder (or the place for a file) beside `path`, which takes its name, flushed to the disk, once the
    body has ended without an error.

    What stood under the name is replaced whole, or stays where `keep` says so then. After an error it is as it was
    before. A kill leaves the old or the new one; between the two renames that replace a folder the old one waits beside
    under another name, from which the next call takes it back. Leftovers of a kill are cleared by the next call.

    alone: nobody else writes `path` now, as a run knows of its own, so that whatever lies under the temporary name may
    go. Else the name is this process's own, and what processes of this machine that are gone have left is cleared.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + path.name) if alone else _partial_of_this_process(path)
    old = path.with_name(REPLACED + path.name)
    if folder and old.exists() and not path.exists():  # killed between the two renames
        old.rename(path)
    _remove(partial)
    if folder:
        partial.mkdir()
    try:
        yield partial
        for each in sorted(partial.rglob("*")) if folder else ():
            flush(each)
        flush(partial)
        if folder and path.exists() and keep(path):
            _remove(partial)
        elif folder:
            _replace(partial, path, old)
        else:
            partial.replace(path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            _remove(partial)
        raise


def _replace(partial: Path, folder: Path, old: Path) -> None:
    """A folder cannot be renamed onto another that is not empty: the old one is set aside first."""
    _remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Forces a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_of_this_process(path: Path) -> Path:
    prefix = f"{PARTIAL}{path.name}.{socket.gethostname()}."
    for left in path.parent.iterdir():
        process = left.name.removeprefix(prefix)
        if left.name.startswith(prefix) and process.isdigit() and not _is_running(int(process)):
            _remove(left)
    return path.with_name(f"{prefix}{os.getpid()}")


def _is_running(process: int) -> bool:
    if process == os.getpid():  # a former process had the same number, as in containers, where it is often 1
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def write_atomically(path: Path, content: bytes) -> None:
    """Makes `path` hold `content`, whole or not at all. One writer per path.

    Raises UsageError when the disk refuses; `path` is then as it was.
    """
    try:
        with atomic_path(path, folder=False) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise refused(path, error) from error


def write_json(path: Path, content: Any, *, ascii_only: bool = True) -> None:
    """The same for JSON, indented."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=ascii_only) + "\n").encode())


def refused(path: Path, error: OSError) -> UsageError:
    """What to tell the user where the disk refuses a file."""
    return UsageError(
        f"cannot write {path} ({error.strerror or error}): make room or mend its permissions, then run the same "
        "command again"
    )


def read_json(path: Path, mend: str = "restore it") -> Any:
    """The content of a JSON file; None where there is none. Raises UsageError with the mend where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); {mend}") from error


@contextmanager
def locked(file: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Holds the lock in `file`, which one process at a time can. Where another has it, `busy` is called, which may
    raise; else this one waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
