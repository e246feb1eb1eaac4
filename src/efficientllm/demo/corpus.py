"""The demo's corpus: the running Python's own standard library, real text that every machine has.

A document is one file. Left out, by these rules:
1. folders of tests, of installed packages and of caches (`SKIPPED_FOLDERS`);
2. generated help texts and build settings, which hold prose tables and this machine's paths (`pydoc_data`,
   `_sysconfigdata*`);
3. tables: files with a line of more than `LONGEST_LINE` characters, or in which more than `LARGEST_TABLE_SHARE` of
   the lines are rows of literals (character maps, HTML entities, keyword lists);
4. files that are not UTF-8, are empty, or repeat an earlier file.
"""

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from efficientllm.errors import UsageError
from efficientllm.files import atomic_path, write_atomically

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)
LONGEST_LINE = 400
LARGEST_TABLE_SHARE = 0.5
HELD_OUT_PERCENT = 5
FEWEST_CHARACTERS = 1_000_000
END_OF_TEXT = "<|endoftext|>"

# A row of a table: a line that starts with a number or a quoted string (not the quotes of a docstring)
_TABLE_ROW = re.compile(r"""\s*[\[({]*(?:[-+]?\d|[bru]?"(?!"")|[bru]?'(?!''))""", re.IGNORECASE)


@dataclass(frozen=True)
class CorpusFacts:
    """What was written: documents in both splits, their characters, and the documents held out for validation."""

    files: int
    characters: int
    held_out_files: int


def write_corpus(folder: Path | str, *, library: Path | None = None) -> CorpusFacts:
    """Write train.jsonl and validation.jsonl, with columns "text" and "path", into `folder`.

    `library` is the folder to read (default: the running Python's standard library). The same files give the same
    bytes, on every machine. Raises UsageError when there are less than a million characters.
    """
    folder = Path(folder)
    root = library if library is not None else Path(sysconfig.get_path("stdlib"))
    splits: dict[bool, list[str]] = {False: [], True: []}
    characters = 0
    for path, text in documents(root):
        splits[is_held_out(path)].append(json.dumps({"text": text, "path": path}) + "\n")
        characters += len(text)
    if characters < FEWEST_CHARACTERS or not all(splits.values()):
        raise UsageError(
            f"the standard library in {root} has only {characters:,} characters of readable Python source, and the "
            f"demo needs {FEWEST_CHARACTERS:,}: run it with a Python whose library is installed as .py files"
        )
    write_atomically(folder / "validation.jsonl", "".join(splits[True]).encode())
    write_atomically(folder / "train.jsonl", "".join(splits[False]).encode())
    return CorpusFacts(sum(map(len, splits.values())), characters, len(splits[True]))


def documents(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path with forward slashes, text with \\n line ends) of each document, sorted by path."""
    seen = set()
    for path in sorted(_source_files(root)):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen and not is_table(text):
            seen.add(digest)  # a copy in the other split would leak it
            yield path, text


def is_table(text: str) -> bool:
    """Whether `text` is data rather than program: a very long line, or mostly rows of literals."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = sum(_TABLE_ROW.match(line) is not None for line in lines)
    return any(len(line) > LONGEST_LINE for line in lines) or rows > LARGEST_TABLE_SHARE * len(lines)


def is_held_out(path: str) -> bool:
    """Whether the document at this relative path is in the validation split: a pure function of its name."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def train_tokenizer(files: Sequence[Path], vocab_size: int, folder: Path | str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the "text" of JSON-lines `files` and save it to `folder` as a transformers tokenizer.

    The vocabulary has at most `vocab_size` entries, the 256 bytes and <|endoftext|> (end, begin and padding) among
    them; it encodes any text without loss. The same files give the same tokenizer. An existing `folder` is replaced
    only by a whole one. Raises UsageError when `vocab_size` is too small to hold the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise UsageError(f"a vocabulary of {vocab_size} is too small: give at least {len(alphabet) + 1} entries")
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(_texts(files), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # it would eat spaces before punctuation, which code needs
    )
    with atomic_path(Path(folder)) as partial:
        tokenizer.save_pretrained(partial)
    return tokenizer


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        with Path(file).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def _source_files(root: Path) -> Iterator[str]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root).as_posix()
