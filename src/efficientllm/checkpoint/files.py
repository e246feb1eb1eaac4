"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
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


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name once the body has ended without an error.

    What stood under the name is replaced whole. After an error it is as it was before; a kill leaves the old
    folder or the new one; between the two renames the old one waits beside under another name, from which the next
    call takes it back. Leftovers of a kill are cleared by the next call.
    """
    partial, old = folder.with_name(PARTIAL + folder.name), _set_aside(folder)
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
