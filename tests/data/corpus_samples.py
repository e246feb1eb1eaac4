"""Stories, files of them, and a small tokenizer, for the tests of the corpus."""

from __future__ import annotations

import glob
import gzip
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from efficientllm.config import DataConfig
from efficientllm.data.corpus import Corpus, load_corpora

EOS = "<|endoftext|>"
LENGTH = 16


def story(number: int) -> str:
    """A text of its own, of 1 to about 120 tokens, with letters beyond ASCII and line ends."""
    return f"Zo\u00eb met fox {number}." + "\nThe fox ran \u2014 and ran." * (number * number % 13)


STORIES = [story(number) for number in range(60)]


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 281 tokens. Like many it puts a special token before a text when asked with special tokens."""
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(STORIES, vocab_size=300, special_tokens=[EOS], show_progress=False)
    model._tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token=EOS)


def load_path(
    cache_dir: Path,
    train: Any,
    vocab_size: int | None = None,
    say: Any = None,
    tokenizer: Any = None,
    trains: bool = True,
    **data: Any,
) -> tuple[list[Corpus], list[Corpus]]:
    """load_corpora of a path or of sources; data: further keys of DataConfig; tokenizer: else small_tokenizer."""
    train = str(train) if isinstance(train, Path) else train
    settings = {"train": train, "sequence_length": LENGTH, "cache_dir": str(cache_dir), "workers": 1}
    tokenizer = tokenizer or small_tokenizer()
    return load_corpora(
        DataConfig(**(settings | data)), tokenizer, vocab_size=vocab_size, on_progress=say, trains=trains
    )


def write_jsonl(path: Path, texts: list[str] = STORIES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stream_of(texts: list[str]) -> list[int]:
    """What the documents should become, end to end."""
    tokenizer = small_tokenizer()
    return [
        token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    ]


def documents_of(texts: list[str], *, ended: bool) -> list[list[int]]:
    """The tokens of each text, an EOS behind them or not."""
    tokenizer = small_tokenizer()
    end = [tokenizer.eos_token_id] if ended else []
    return [[*tokenizer.encode(text, add_special_tokens=False), *end] for text in texts]


def write_megatron(path: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> Path:
    """PATH.idx and PATH.bin as Megatron-LM writes them; documents: of sequences of tokens. Returns the index."""
    codes = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
    sequences = [np.asarray(sequence, dtype) for document in documents for sequence in document]
    lengths = np.asarray([len(sequence) for sequence in sequences], "<i4")
    begins = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    borders = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, codes[dtype], len(sequences), len(borders))
    index = Path(f"{path}.idx")
    index.write_bytes(head + lengths.tobytes() + begins.tobytes() + borders.tobytes())
    Path(f"{path}.bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    return index


def tokens_in(part: Corpus) -> list[int]:
    return part.take(range(len(part))).flatten().tolist()


def documents_in(part: Corpus) -> set[tuple[int, ...]]:
    """The documents that stand in the rows as a whole."""
    documents: list[tuple[int, ...]] = []
    tokens, first = tokens_in(part), 0
    for place, token in enumerate(tokens):
        if token == small_tokenizer().eos_token_id:
            documents.append(tuple(tokens[first:place]))
            first = place + 1
    return set(documents)


def pack_zstd(path: Path) -> None:
    with pa.CompressedOutputStream(str(path) + ".zst", "zstd") as packed:
        packed.write(path.read_bytes())
    path.unlink()


def pack_gzip(path: Path) -> None:
    Path(str(path) + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def make_parquet(folder: Path) -> str:
    table = pa.table({"id": range(60), "text": STORIES})
    pq.write_table(table.slice(0, 25), folder / "a [1].parquet", row_group_size=7)
    pq.write_table(table.slice(25).cast(pa.schema({"id": pa.float64(), "text": pa.string()})), folder / "b.parquet")
    return glob.escape(str(folder)) + "/[ab]*.parquet"


def make_jsonl(folder: Path) -> str:
    """Metadata that differs from record to record and from file to file, blank lines, an empty file, a BOM."""
    lines = [{"text": text, "meta": [number, "x", None][number % 3]} for number, text in enumerate(STORIES)]
    (folder / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines[:25]))
    (folder / "b.jsonl").write_text("")
    (folder / "c.jsonl").write_text("\n".join(json.dumps({**line, "url": 1}) for line in lines[25:]))
    return glob.escape(str(folder)) + "/*.jsonl"


def make_json_array(folder: Path) -> str:
    """Its first lines are blank."""
    (folder / "all.json").write_text("\n \n" + json.dumps([{"text": text} for text in STORIES], indent=1))
    return str(folder / "all.json")


def make_packed(pack: Callable[[Path], None]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        pack(write_jsonl(folder / "a.jsonl"))
        return str(folder)

    return make


def make_txt(folder: Path) -> str:
    for number, text in enumerate(STORIES):
        (folder / f"part-{number // 20}").mkdir(exist_ok=True)
        (folder / f"part-{number // 20}" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    (folder / ".hidden.jsonl").write_text("not data")
    return str(folder)


def make_saved(folder: Path) -> str:
    datasets.Dataset.from_dict({"text": STORIES, "id": range(60)}).save_to_disk(folder / "saved", num_shards=2)
    return str(folder / "saved")


def make_saved_splits(folder: Path) -> str:
    splits = {
        "test": datasets.Dataset.from_dict({"text": ["x"]}),
        "train": datasets.Dataset.from_dict({"text": STORIES}),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return str(folder / "saved")
