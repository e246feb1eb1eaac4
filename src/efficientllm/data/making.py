"""What a corpus needs in its cache folder, made once: rows of texts and conversations, or an index of tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from efficientllm.data.chat import ChatEncoder, messages_of
from efficientllm.data.documents import no_documents
from efficientllm.data.encoding import Encoder, tokenise
from efficientllm.data.locating import Located
from efficientllm.data.packing import pack
from efficientllm.data.rows import ArrowRows, Documents, Holdout, Part, Rows, batches_of, cut, id_dtype, plan_holdout
from efficientllm.data.sources import read
from efficientllm.data.token_files import shards_of, tokens_of
from efficientllm.data.tokenised import TokenRows, check_tokens, digests_of, divide, index_of, write_index
from efficientllm.errors import UsageError

PARTS = ("train", "validation")


@dataclass(frozen=True)
class Maker:
    """Makes and opens the parts of corpora. length: tokens of a row; fraction: of the documents, to hold out."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    workers: int
    say: Callable[[str], None]

    def make(self, located: Located, folder: Path, fraction: float | None) -> dict[str, Part]:
        """Writes the rows, or the index of them, into a folder. Raises UsageError for what cannot be used."""
        self.say(f"{located.name}: reading")
        if located.content == "tokens":
            train, held = self._index(located, folder, fraction)
        else:
            scratch = folder / "scratch"
            scratch.mkdir()
            train, held = self._tokenise(located, folder, scratch, fraction)
            shutil.rmtree(scratch)
        return dict(zip(PARTS, (train,) if fraction is None else (train, held), strict=False))

    def open(self, located: Located, folder: Path, name: str) -> Rows:
        """The rows of a part that is whole."""
        file = file_of(located, folder, name)
        if located.content != "tokens":
            return ArrowRows(file)
        tokens, index = tokens_of(located, folder, id_dtype(self.tokenizer)), np.load(file, mmap_mode="r")
        if index.shape[1] and index[1, -1] > sum(map(len, tokens)):
            raise UsageError(f"the tokens of '{located.name}' in {folder} are cut short; remove that folder")
        return TokenRows(tokens, index, self.length, self._end)

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _tokenise(self, located: Located, folder: Path, scratch: Path, fraction: float | None) -> tuple[Part, Part]:
        name, chat = located.name, located.content == "chat"
        texts = read(located, scratch / "source", self.workers)
        self.say(f"{name}: tokenising {len(texts):,} {'conversations' if chat else 'documents'}")
        encoder = ChatEncoder(self.tokenizer, self.length, name) if chat else Encoder(self.tokenizer)
        if isinstance(encoder, ChatEncoder):
            _try(encoder, texts, name)
        tokens = tokenise(texts, encoder, scratch, self.workers, name)
        if chat and len(tokens) and not any(lengths.any() for lengths, _, _ in batches_of(tokens)):
            raise UsageError(
                f"'{name}': all {len(tokens):,} conversations are longer than a row of {self.length:,} tokens; raise "
                "data.sequence_length"
            )
        holdout = self._plan(partial(_documents, tokens), name, fraction, chat)
        files = [file_of(located, folder, part) for part in PARTS]
        if chat:
            return pack(tokens, holdout, self.length, encoder.dtype, self._end, files[0], files[1])
        return cut(tokens, holdout, self.length, encoder.dtype, files[0], files[1])

    def _index(self, located: Located, folder: Path, fraction: float | None) -> tuple[Part, Part]:
        shards = list(shards_of(located, folder, id_dtype(self.tokenizer)))
        self.say(f"{located.name}: looking through {sum(len(shard.tokens) for shard in shards):,} tokens")
        largest = check_tokens(shards, self.tokenizer, located.name)
        index = index_of(shards, self._end, whole=located.kind == "megatron")
        digests = np.zeros(index.shape[1], np.uint64) if fraction is None else digests_of(shards, index)
        lengths = np.diff(index[2], prepend=0)
        divided = divide(index, digests, self._plan(lambda: iter([(lengths, digests)]), located.name, fraction))
        train, held = (
            write_index(part, file_of(located, folder, name), self.length, largest)
            for part, name in zip(divided, PARTS, strict=True)
        )
        return train, held

    def _plan(
        self, documents: Callable[[], Documents], name: str, fraction: float | None, chat: bool = False
    ) -> Holdout:
        """What is held out; refuses a source without enough text."""
        total = sum(int(lengths.sum()) for lengths, _ in documents())
        if not total:
            raise no_answers(name) if chat else no_documents(name)
        if total < self.length and not chat:
            raise UsageError(
                f"'{name}' has {total:,} tokens, fewer than one row of {self.length:,}; add text or lower "
                "data.sequence_length"
            )
        holdout = Holdout() if fraction is None else plan_holdout(documents, fraction, self.length)
        if chat and (holdout is None or holdout.position is not None):
            raise UsageError(
                f"'{name}': its conversations cannot be divided into some to train on and some to hold out; add some, "
                "or name data.validation"
            )
        if holdout is None:
            raise UsageError(
                f"'{name}' has {total:,} tokens, fewer than two rows of {self.length:,}, so that nothing can be held "
                "out; add text, lower data.sequence_length or name data.validation"
            )
        return holdout


def file_of(located: Located, folder: Path, name: str) -> Path:
    return folder / f"{name}.{'npy' if located.content == 'tokens' else 'arrow'}"


def no_answers(name: str) -> UsageError:
    return UsageError(f"'{name}' holds no conversation with an answer of the assistant; add some")


def _documents(tokens: Dataset) -> Documents:
    return ((lengths, digests) for lengths, digests, _ in batches_of(tokens))


def _try(encoder: ChatEncoder, chats: Dataset, name: str) -> None:
    """Raises UsageError here, and not in a worker process, where the template does not do what it must."""
    for record in chats.data.column(0):
        messages = messages_of(record.as_py(), name)
        if messages:
            encoder(messages)
            return
