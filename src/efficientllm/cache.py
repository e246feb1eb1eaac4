"""The cache on disk: where it is, and digests of the files that its content is made of."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from efficientllm.errors import UsageError

_SETTLED_SECONDS = 2.0


def cache_root(chosen: str | None = None) -> Path:
    """Where what is computed once is kept: `chosen`, $EFFICIENTLLM_CACHE, or the user's cache."""
    return Path(chosen or os.environ.get("EFFICIENTLLM_CACHE", "~/.cache/efficientllm")).expanduser()


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
