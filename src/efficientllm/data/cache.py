"""What the text of a cache folder depends on besides its files, and what a disk does to it, in one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from efficientllm.data.sources import disk_full
from efficientllm.errors import UsageError

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


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
