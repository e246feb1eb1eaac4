"""Texts to the tokens of each document, in parallel."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Sequence, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from efficientllm.data.chat import ChatEncoder, encode_chats
from efficientllm.data.documents import pieces
from efficientllm.data.rows import COLUMN, DIGEST, MARKS, id_dtype

_GROUP_CHARS = 1 << 20
_BATCH_BYTES = 16 << 20
_PROCESS_BYTES = 4 << 20  # starting a process takes longer than tokenising less than this


class Encoder:
    """Texts to token ids, without special tokens around them. Pickles into worker processes.

    dtype: uint16 where every id of the tokenizer fits, which halves files and reading; int32 otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.dtype = id_dtype(tokenizer)
        self.end = np.array([tokenizer.eos_token_id], dtype=self.dtype)
        self._tokenizer: Any = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None) is not None
        if self._fast:  # its own method that reckons no offsets takes half the time
            self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self._split_special = bool(getattr(tokenizer, "split_special_tokens", False))

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, (tokens,) of dtype."""
        if self._fast:
            self._tokenizer.encode_special_tokens = self._split_special  # which pickling forgets
            encoded = [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=self.dtype) for ids in encoded]


def _groups(texts: Iterable[pa.Scalar]) -> Iterator[list[tuple[str, int | None]]]:
    """Pieces in groups of bounded size; with the last piece of a document comes the digest of its whole text."""
    group: list[tuple[str, int | None]] = []
    chars = 0
    for text in filter(None, (scalar.as_py() for scalar in texts)):
        rest = len(text)
        for piece in pieces(text):
            rest -= len(piece)
            chars += len(piece)
            digest = None if rest else int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            group.append((piece, digest))
            if chars >= _GROUP_CHARS:
                yield group
                group, chars = [], 0
    if group:
        yield group


def encode(batch: pa.Table, *, encoder: Encoder) -> pa.Table:
    """One column of texts -> `input_ids` (list of ids, with EOS) and `digest` (uint64). Empty texts fall out."""
    values: list[np.ndarray] = [encoder.end[:0]]
    lengths, digests, length = [0], [], 0
    for group in _groups(batch.column(0)):
        for ids, (_, digest) in zip(encoder([piece for piece, _ in group]), group, strict=True):
            values.append(ids)
            length += len(ids)
            if digest is not None:
                values.append(encoder.end)
                lengths.append(length + 1)
                digests.append(digest)
                length = 0
    tokens = pa.ListArray.from_arrays(pa.array(np.cumsum(lengths), type=pa.int32()), pa.array(np.concatenate(values)))
    return pa.table({COLUMN: tokens, DIGEST: pa.array(digests, type=pa.uint64())})


def tokenise(
    texts: Dataset,
    encoder: Encoder | ChatEncoder,
    folder: Path,
    workers: int,
    name: str,
) -> Dataset:
    """The tokens of each document as a memory-mapped data set under `folder`: columns `input_ids`, `digest` and, of
    conversations, `marks`. texts: one column of texts or conversations.

    Special tokens that stand in a text, such as an EOS between stories, are read as such; none are added inside.
    """
    chat = isinstance(encoder, ChatEncoder)
    kinds = {COLUMN: Sequence(Value(encoder.dtype.name)), DIGEST: Value("uint64")}
    size = max(1, texts.data.nbytes)
    processes = min(workers, len(texts), math.ceil(size / _PROCESS_BYTES))
    return texts.with_format("arrow").map(
        encode_chats if chat else encode,
        batched=True,
        batch_size=max(1, min(1000, len(texts) * _BATCH_BYTES // size)),
        remove_columns=texts.column_names,
        features=Features(kinds | ({MARKS: Sequence(Value("uint8"))} if chat else {})),
        fn_kwargs={"encoder": encoder},
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(folder / "tokens.arrow"),
        load_from_cache_file=False,
        new_fingerprint="0" * 16,  # never looked up: `folder` is this tokenisation's own
        desc=f"tokenising {name}",
    )
