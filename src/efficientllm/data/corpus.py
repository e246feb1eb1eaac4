"""The corpus: memory-mapped rows of `sequence_length` tokens, of text and conversations, tokenised once, or of tokens
that are there already; cached by content.

The cache folder of a source is named by a sha256 over all that its rows depend on: the bytes of its files (or the
fingerprint of a hub data set, which contains its revision), the column, the tokenizer (with its chat template where
there are conversations), the row length and the rule of what is held out. It appears under that name only when it is
complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from efficientllm.cache import cache_root, file_digest
from efficientllm.data.cache import plain_errors, tokenizer_digest
from efficientllm.data.chat import chat_template
from efficientllm.data.locating import Content, Located, locate
from efficientllm.data.making import Maker, file_of
from efficientllm.data.planes import Planes, with_planes
from efficientllm.data.rows import Part, Rows
from efficientllm.data.sources import load_from_hub, resolved
from efficientllm.errors import UsageError
from efficientllm.files import atomic_path, locked

if TYPE_CHECKING:
    from efficientllm.config import DataConfig, DataSource

_FORMAT = 1  # of the cache; a new number makes old caches invisible


@dataclass(frozen=True)
class Corpus:
    """Rows of tokens from one source.

    rows: on the disk; weight relative to the other sources; documents begun in it; tokens, those of a last, partial row
    included, which is not in `rows`; key: digest of everything that the rows depend on; end: the EOS, one of which
    follows each document but conversations, which the template ends; planes: of the rows that `take` gives; content:
    what its records hold.
    """

    name: str
    rows: Rows
    weight: float
    documents: int
    tokens: int
    key: str = ""
    end: int = -1
    planes: Planes = Planes.TOKENS
    content: Content = "text"

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> Tensor:
        """Rows by index, in that order, int64 (len(indices), sequence_length) or with planes (data/planes.py). Raises
        IndexError for one outside."""
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"row outside range({len(self)}) of {self.name}")
        marks = None if self.planes == Planes.TOKENS else self.rows.marks(index)
        return torch.from_numpy(with_planes(self.rows.take(index), marks, self.planes, self.end))


def load_corpora(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int | None = None,
    on_progress: Callable[[str], None] | None = None,
    trains: bool = True,
) -> tuple[list[Corpus], list[Corpus]]:
    """The corpora to train on and to validate on, tokenised now or found in the cache.

    Where data.validation is a share, that of the documents of each source is held out, chosen by a hash of their text
    (rows.plan_holdout), and never trained on. A source that cannot be divided by documents, as when it is
    a single one, has its last rows held out instead. At most one partial row is left out at the end of each part.

    Where one source to train on holds conversations, rows of all of them have labels, and with data.within_documents
    positions too (data/planes.py).

    trains: whether anybody will; else sources that nothing is held out of are left unread.

    vocab_size: of the model, to see that the tokenizer's ids fit in. on_progress is told in one line what happens;
    progress bars go to stderr. Raises UsageError for input that cannot be used.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UsageError(
            "the tokenizer has no EOS token to put between documents; name one as eos_token in "
            "its tokenizer_config.json"
        )
    _check_ids(int(eos), "its EOS", vocab_size)
    loader = _Loader(data, tokenizer, on_progress or (lambda line: None))
    train, validation = [], []
    for source in data.train if trains or not data.validation_sources else ():
        corpora, largest_id = loader.load(source, data.held_out)
        _check_ids(largest_id, corpora[0].name, vocab_size)
        train.append(corpora[0])
        validation.extend(corpora[1:])
    for source in data.validation_sources:
        corpora, largest_id = loader.load(source, None)
        _check_ids(largest_id, corpora[0].name, vocab_size)
        validation.append(corpora[0])
    seen = {corpus.key for corpus in train}
    for corpus in validation if data.validation_sources else ():
        if corpus.key in seen:
            loader.say(f"{corpus.name} is both trained and validated on: its validation loss is of text that was seen")
    planes = max((corpus.planes for corpus in train), default=Planes.TOKENS)
    return [replace(corpus, planes=planes) for corpus in train], validation


def _check_ids(largest_id: int, what: str, vocab_size: int | None) -> None:
    if vocab_size is not None and largest_id >= vocab_size:
        raise UsageError(
            f"the tokenizer gives token id {largest_id} for {what}, but the model's vocabulary has {vocab_size} "
            "entries: they do not belong together; set `tokenizer` to the model's own"
        )


class _Loader:
    """Loads sources one by one: from the cache, or by making what is missing there."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        self._tokenizer, self.say, self._length = tokenizer, say, data.sequence_length
        self._workers, self._within = data.workers or _cores(), data.within_documents
        self._maker = Maker(tokenizer, self._length, self._workers, say)
        self._cache = cache_root(data.cache_dir) / "corpora"
        self._tokenizer_digest = tokenizer_digest(tokenizer)

    def load(self, source: DataSource, fraction: float | None) -> tuple[list[Corpus], int]:
        """The corpus of a source and, where a fraction is held out, that corpus; and the largest token id in both."""
        located = resolved(locate(source))
        with plain_errors(located.name, self._cache):
            folder = self._cache / self._key(located, fraction)
            parts = _parts_in(located, folder)
            if parts is None:
                waiting = f"{located.name}: another process is tokenising it; waiting"
                with locked(folder.with_suffix(".lock"), lambda: self.say(waiting)):
                    parts = _parts_in(located, folder) or self._make(located, folder, fraction)
        corpora = [self._corpus(located, folder, name, part) for name, part in parts.items()]
        self.say(f"{located.name}: {said(located, list(parts.values()))}")
        return corpora, max(part.largest_id for part in parts.values())

    def _corpus(self, located: Located, folder: Path, name: str, part: Part) -> Corpus:
        planes = Planes.LABELS if located.content == "chat" else Planes.TOKENS
        return Corpus(
            located.name + (" (held out)" if name == "validation" else ""),
            self._maker.open(located, folder, name),
            located.source.weight,
            part.documents,
            part.tokens,
            folder.name,
            int(self._tokenizer.eos_token_id),
            Planes.POSITIONS if self._within else planes,
            located.content,
        )

    def _key(self, located: Located, fraction: float | None) -> str:
        """Names the cache folder: a digest of everything that the rows depend on."""
        if located.kind == "hub":
            content = [load_from_hub(located)._fingerprint]
        else:
            with ThreadPoolExecutor(self._workers) as pool:
                content = list(pool.map(lambda path: file_digest(path, self._cache / "digests"), located.files()))
        parts = {
            "format": _FORMAT,
            "kind": located.kind,
            "content": content,
            "column": located.column,
            "tokenizer": self._tokenizer_digest,
            "length": self._length,
            "held_out": fraction,
        }
        if located.content != "text":
            parts["of"] = located.content
        if located.content == "chat":
            parts["template"] = chat_template(self._tokenizer, located.name)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    def _make(self, located: Located, folder: Path, fraction: float | None) -> dict[str, Part]:
        """Makes the cache folder of a source and returns what is in it."""
        # One that is whole has been made by another machine meanwhile, with the same content, and may be in use.
        with atomic_path(folder, alone=False, keep=lambda there: _parts_in(located, there) is not None) as done:
            parts = self._maker.make(located, done, fraction)
            if located.kind != "hub" and self._key(located, fraction) != folder.name:
                raise UsageError(f"'{located.name}' changed while it was read; run again once it is complete")
            (done / "parts.json").write_text(json.dumps({name: asdict(part) for name, part in parts.items()}))
        return parts


def said(located: Located, parts: Sequence[Part]) -> str:
    """What a source holds, in a line: that which is held out last."""
    what = "conversations" if located.content == "chat" else "documents"
    line = ", held out ".join(f"{part.rows:,} rows of {part.documents:,} {what}" for part in parts)
    predicted, tokens = (sum(getattr(part, name) for part in parts) for name in ("predicted", "tokens"))
    left_out = sum(part.left_out for part in parts)
    if predicted:
        line += f", {predicted / tokens:.0%} of whose tokens are the assistant's"
    if left_out:
        line += f"; {left_out:,} that are longer than a row are left out"
    return line


def _parts_in(located: Located, folder: Path) -> dict[str, Part] | None:
    """What a cache folder holds; None if it is not there or not whole."""
    try:
        parts = {name: Part(**part) for name, part in json.loads((folder / "parts.json").read_text()).items()}
        whole = all(file_of(located, folder, name).stat().st_size == part.file_bytes for name, part in parts.items())
    except (OSError, ValueError, TypeError):
        return None
    return parts if whole else None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
