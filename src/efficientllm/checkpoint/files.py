"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
REPLACED = ".replaced-"


def flush(path: Path) -> None:
    """Forces a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of_this_process(path: Path) -> Path:
    """Where this process writes what is to become `path`, so that two that write it at once do not mix.

    What processes of this machine that are gone have left for the same path is removed.
    """
    prefix = f"{PARTIAL}{path.name}.{socket.gethostname()}."
    if path.parent.is_dir():
        for left in path.parent.iterdir():
            process = left.name.removeprefix(prefix)
            if left.name.startswith(prefix) and process.isdigit() and not _is_running(int(process)):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
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


@contextmanager
def appearing(folder: Path, *, alone: bool = True) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name once the body has ended without an error.

    What stood under the name is replaced whole. After an error it is as it was before; a kill leaves the old
    folder or the new one; between the two renames the old one waits beside under another name, from which the next
    call takes it back. Leftovers of a kill are cleared by the next call.

    alone: nobody else writes the folder now, as a run knows of its own, so that whatever lies under the temporary
    name may go. Else the name is this process's own.
    """
    partial = folder.with_name(PARTIAL + folder.name) if alone else partial_of_this_process(folder)
    old = _set_aside(folder)
    if old.exists() and not folder.exists():  # killed between the two renames of _replace
        old.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            flush(path)
        flush(partial)
        _replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _set_aside(folder: Path) -> Path:
    """Where a folder waits while its successor takes its name."""
    return folder.with_name(REPLACED + folder.name)


def _replace(partial: Path, folder: Path) -> None:
    old = _set_aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
