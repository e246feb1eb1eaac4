"""Files of token ids, mapped as they are: Megatron-LM's .bin with its .idx, lists in Arrow files.

An index of Megatron's (megatron/core/datasets/indexed_dataset.py), all little-endian:

    9 bytes   MMIDIDX, two zeros          int32 (sequences)      tokens of each sequence
    uint64    version, 1                  int64 (sequences)      the byte of .bin where it begins
    uint8     code of the tokens' dtype   int64 (documents + 1)  the sequence with which each document begins
    uint64    sequences                   int8 (sequences)       modes, in multimodal ones alone: not read
    uint64    documents + 1

Parquet's lists lie packed in pages, which nothing can map: they are unpacked once, to a file of flat tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from efficientllm.data.documents import no_text, readable
from efficientllm.data.locating import Located
from efficientllm.data.sources import load_from_hub, opened
from efficientllm.errors import UsageError

UNPACKED = "tokens.bin"  # of parquet files, in the cache folder
_HEADER, _OLD_HEADER = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


@dataclass(frozen=True)
class Shard:
    """One stretch of mapped tokens (tokens,), of an integer dtype, and where its documents begin and end, int64."""

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def shards_of(located: Located, folder: Path, dtype: np.dtype) -> Iterator[Shard]:
    """All shards of a source, in order. folder, dtype: where and as what parquet files are unpacked.

    Raises UsageError for files that are damaged, do not belong together, or hold no token ids.
    """
    if located.kind == "megatron":
        yield from (_megatron(path) for path in located.paths)
    elif located.kind == "parquet":
        yield _unpacked(located, folder / UNPACKED, dtype)
    elif located.kind == "hub":
        yield from _lists(located, located.name, load_from_hub(located).data.column(located.column))
    else:
        for path in located.paths:
            records = opened(located, path)
            if located.column not in records.column_names:
                raise UsageError(f"'{path}' has no column '{located.column}', as other files of '{located.name}' have")
            yield from _lists(located, str(path), records.data.column(located.column))


def tokens_of(located: Located, folder: Path, dtype: np.dtype) -> list[np.ndarray]:
    """The mapped tokens of all shards, in order. folder, dtype: where and as what parquet files have been unpacked."""
    if located.kind == "parquet":
        return [np.memmap(folder / UNPACKED, dtype=dtype, mode="r")]
    return [shard.tokens for shard in shards_of(located, folder, dtype)]


def _megatron(index: Path) -> Shard:
    with readable(index), index.open("rb") as stream:
        head = stream.read(34)
    if head[:8] == _OLD_HEADER:
        raise UsageError(f"'{index}' is of Megatron's older format, TNTIDX; preprocess the text anew, or as mmap")
    if head[:9] != _HEADER or len(head) < 34:
        raise UsageError(f"'{index}' is no index of Megatron's .bin files, by its first bytes; replace it")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    sequences, borders = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
    kind = np.dtype(_DTYPES.get(code, np.float64))
    if version != 1 or kind.kind == "f":
        raise UsageError(
            f"'{index}' is of version {version} with tokens of type {code}; version 1 with whole numbers is"
        )
    if index.stat().st_size - 34 not in (12 * sequences + 8 * borders, 13 * sequences + 8 * borders):
        raise UsageError(f"'{index}' is cut short or damaged: it says {sequences:,} sequences; copy it anew")
    lengths, pointers, documents = (
        np.memmap(index, kind_of, "r", at, (count,)) if count else np.zeros(0, np.int64)
        for kind_of, at, count in (
            ("<i4", 34, sequences),
            ("<i8", 34 + 4 * sequences, sequences),
            ("<i8", 34 + 12 * sequences, borders),
        )
    )
    flat = index.with_suffix(".bin")
    count, rest = divmod(flat.stat().st_size, kind.itemsize)
    tokens = np.memmap(flat, kind, "r", 0, (count,)) if count else np.zeros(0, kind)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # of the sequences, which lie end to end
    inside = borders > 0 and documents[0] == 0 and documents[-1] == sequences and bool((np.diff(documents) >= 0).all())
    if not inside or rest or ends[-1] != count or (pointers != ends[:-1] * kind.itemsize).any():
        raise UsageError(
            f"'{index}' does not match '{flat.name}', which has {count:,} tokens; copy both anew, from one run of the "
            "preprocessing"
        )
    return Shard(tokens, ends[documents[:-1]], ends[documents[1:]])


def _lists(located: Located, where: str, column: pa.ChunkedArray) -> Iterator[Shard]:
    """A shard a chunk of a column of lists, without a copy."""
    for chunk in column.chunks:
        if not hasattr(chunk, "values") or not pa.types.is_integer(chunk.type.value_type):
            raise no_text(where, located.column, str(chunk.type), "token ids")
        if chunk.values.null_count:
            raise UsageError(
                f"{where}: column '{located.column}' has gaps (null) among the token ids; fill or drop them"
            )
        if pa.types.is_fixed_size_list(chunk.type):
            borders = (np.arange(len(chunk) + 1) + chunk.offset) * chunk.type.list_size
        else:
            borders = chunk.offsets.to_numpy().astype(np.int64)
        yield Shard(chunk.values.to_numpy(), borders[:-1], borders[1:])


def _unpacked(located: Located, path: Path, dtype: np.dtype) -> Shard:
    """Unpacks parquet files to one file of flat tokens of dtype. Raises UsageError for ids that do not fit in."""
    borders, total, limit = [np.zeros(1, np.int64)], 0, np.iinfo(dtype)
    with path.open("wb") as out:
        for file in located.paths:
            with readable(file), pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(columns=[located.column]):
                    for shard in _lists(located, str(file), pa.chunked_array([batch.column(0)])):
                        tokens = shard.tokens[shard.starts[0] : shard.stops[-1]] if len(shard.starts) else shard.tokens
                        if len(tokens) and not limit.min <= tokens.min() <= tokens.max() <= limit.max:
                            raise UsageError(
                                f"'{file}' has token ids from {tokens.min()} to {tokens.max()}, which the tokenizer "
                                "does not have: it is of another one; set `tokenizer`, or tokenise the text anew"
                            )
                        out.write(tokens.astype(dtype).tobytes())
                        borders.append(shard.stops - (shard.starts[0] if len(shard.starts) else 0) + total)
                        total += len(tokens)
    ends = np.concatenate(borders)
    tokens = np.memmap(path, dtype, "r") if total else np.zeros(0, dtype)
    return Shard(tokens, ends[:-1], ends[1:])
