"""The corpus: text tokenised once, kept as memory-mapped rows of `sequence_length` tokens, cached by content.

The cache folder of a source is named by a sha256 over all that its rows depend on: the bytes of its files (or the
fingerprint of a hub data set, which contains its revision), the text column, the tokenizer, the row length and the
rule of what is held out. It appears under that name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from efficientllm.cache import cache_root, file_digest
from efficientllm.data.cache import plain_errors, tokenizer_digest
from efficientllm.data.documents import no_documents
from efficientllm.data.rows import COLUMN, Encoder, Holdout, Part, count_tokens, cut, plan_holdout, tokenise
from efficientllm.data.sources import Located, load_from_hub, locate, read
from efficientllm.errors import UsageError
from efficientllm.files import atomic_path, locked

if TYPE_CHECKING:
    from efficientllm.config import DataConfig, DataSource

_FORMAT = 1  # of the cache; a new number makes old caches invisible


@dataclass(frozen=True)
class Corpus:
    """Rows of tokens from one source.

    rows: column `input_ids`, fixed-size lists of uint16 or int32, one EOS after each document; weight relative to
    the other sources; documents begun in it; tokens, those of a last, partial row included, which is not in `rows`;
    key: digest of everything that the rows depend on.
    """

    name: str
    rows: Dataset
    weight: float
    documents: int
    tokens: int
    key: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> Tensor:
        """Rows by index, in that order, int64 (len(indices), sequence_length). Raises IndexError for one outside."""
        index = np.asarray(indices, dtype=np.int64)
        if index.size and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"row outside range({len(self)}) of {self.name}")
        starts, views = self._chunks
        chunks = np.searchsorted(starts, index, side="right") - 1
        taken = np.empty((len(index), views[0].shape[1]), dtype=np.int64)
        for chunk in np.unique(chunks):
            here = chunks == chunk
            taken[here] = views[chunk][index[here] - starts[chunk]]
        return torch.from_numpy(taken)

    @cached_property
    def _chunks(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """First row of each chunk of the file, and the chunks as views (rows, sequence_length) of the mapped file."""
        column = self.rows.data.column(COLUMN)
        views = [chunk.flatten().to_numpy().reshape(len(chunk), column.type.list_size) for chunk in column.chunks]
        return np.cumsum([0, *(len(view) for view in views[:-1])]), views


def load_corpora(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[list[Corpus], list[Corpus]]:
    """The corpora to train on and to validate on, tokenised now or found in the cache.

    Where data.validation is a share, that of the documents of each source is held out, chosen by a hash of their text
    (rows.plan_holdout), and never trained on. A source that cannot be divided by documents, as when it is
    a single one, has its last rows held out instead. At most one partial row is left out at the end of each part.

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
    for source in data.train:
        corpora, largest_id = loader.load(source, data.held_out)
        _check_ids(largest_id, corpora[0].name, vocab_size)
        train.append(corpora[0])
        validation.extend(corpora[1:])
    for source in data.validation_sources:
        corpora, largest_id = loader.load(source, None)
        _check_ids(largest_id, corpora[0].name, vocab_size)
        validation.append(corpora[0])
    return train, validation


def _check_ids(largest_id: int, what: str, vocab_size: int | None) -> None:
    if vocab_size is not None and largest_id >= vocab_size:
        raise UsageError(
            f"the tokenizer gives token id {largest_id} for {what}, but the model's vocabulary has {vocab_size} "
            "entries: they do not belong together; set `tokenizer` to the model's own"
        )


class _Loader:
    """Loads sources one by one: from the cache, or by making what is missing there."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._length = data.sequence_length
        self._workers = data.workers or _cores()
        self._cache = cache_root(data.cache_dir) / "corpora"
        self._tokenizer_digest = tokenizer_digest(tokenizer)

    def load(self, source: DataSource, fraction: float | None) -> tuple[list[Corpus], int]:
        """The corpus of a source and, where a fraction is held out, that corpus; and the largest token id in both."""
        located = locate(source)
        with plain_errors(located.name, self._cache):
            folder = self._cache / self._key(located, fraction)
            parts = _facts(folder)
            if parts is None:
                waiting = f"{located.name}: another process is tokenising it; waiting"
                with locked(folder.with_suffix(".lock"), lambda: self._say(waiting)):
                    parts = _facts(folder) or self._make(located, folder, fraction)
        corpora = [
            Corpus(
                located.name + (" (held out)" if name == "validation" else ""),
                Dataset.from_file(str(_file(folder, name))),
                source.weight,
                part.documents,
                part.tokens,
                folder.name,
            )
            for name, part in parts.items()
        ]
        counted = (f"{len(corpus):,} rows of {corpus.documents:,} documents" for corpus in corpora)
        self._say(f"{located.name}: {', held out '.join(counted)}")
        return corpora, max(part.largest_id for part in parts.values())

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
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    def _make(self, located: Located, folder: Path, fraction: float | None) -> dict[str, Part]:
        """Tokenises a source into its cache folder and returns what is in it."""
        name = located.name
        # One that is whole has been made by another machine meanwhile, with the same content, and may be in use.
        with atomic_path(folder, alone=False, keep=lambda there: _facts(there) is not None) as done:
            partial = done / "scratch"
            partial.mkdir()
            self._say(f"{name}: reading")
            texts = read(located, partial / "source", self._workers)
            if located.kind != "hub" and self._key(located, fraction) != folder.name:
                raise UsageError(f"'{name}' changed while it was read; run again once it is complete")
            self._say(f"{name}: tokenising {len(texts):,} documents")
            encoder = Encoder(self._tokenizer)
            tokens = tokenise(texts, encoder, partial, self._workers, name)
            holdout = self._plan(tokens, name, fraction)
            files = _file(done, "train"), _file(done, "validation")
            train, held = cut(tokens, holdout, self._length, encoder.dtype, *files)
            parts = {"train": train} if fraction is None else {"train": train, "validation": held}
            (done / "parts.json").write_text(json.dumps({name: asdict(part) for name, part in parts.items()}))
            shutil.rmtree(partial)
        return parts

    def _plan(self, tokens: Dataset, name: str, fraction: float | None) -> Holdout:
        """What is held out; refuses a source without enough text."""
        total = count_tokens(tokens)
        if not total:
            raise no_documents(name)
        if total < self._length:
            raise UsageError(
                f"'{name}' has {total:,} tokens, fewer than one row of {self._length:,}; add text or lower "
                "data.sequence_length"
            )
        holdout = Holdout() if fraction is None else plan_holdout(tokens, fraction, self._length)
        if holdout is None:
            raise UsageError(
                f"'{name}' has {total:,} tokens, fewer than two rows of {self._length:,}, so that nothing can be held "
                "out; add text, lower data.sequence_length or name data.validation"
            )
        return holdout


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.arrow"


def _facts(folder: Path) -> dict[str, Part] | None:
    """What a cache folder holds; None if it is not there or not whole."""
    try:
        parts = {name: Part(**facts) for name, facts in json.loads((folder / "parts.json").read_text()).items()}
        whole = all(_file(folder, name).stat().st_size == part.file_bytes for name, part in parts.items())
    except (OSError, ValueError, TypeError):
        return None
    return parts if whole else None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
