"""Conversations to tokens by the tokenizer's chat template, and which of them the assistant has written.

The template's own {% generation %} markers say so, where it has them. Else a conversation is rendered up to each answer
of the assistant, with the prompt that a chat would put there: that must be how the whole conversation begins. The
answer goes on to the first EOS, or where the template writes none to the end of the conversation rendered up to it,
which must again be how the whole one begins.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from efficientllm.data.rows import BEGINS, COLUMN, CONTEXT, DIGEST, MARKS, id_dtype
from efficientllm.errors import UsageError

Message = dict[str, Any]
_MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SHOWN = 60  # characters of a conversation that a message repeats


class ChatEncoder:
    """Conversations to token ids and marks. Pickles into worker processes.

    length: of a row; a longer conversation is left out. Raises UsageError for a tokenizer that cannot render them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, name: str) -> None:
        self.dtype = id_dtype(tokenizer)
        self._tokenizer, self._length, self._name = tokenizer, length, name
        self._marked = bool(_MARKERS.search(chat_template(tokenizer, name)))

    def __call__(self, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (tokens,) of dtype, and marks (tokens,) uint8; empty where the conversation is longer than a row.

        Raises UsageError for messages that the template does not take, or whose answers it does not let be told.
        """
        try:
            ids, answers = self._by_markers(messages) if self._marked else self._by_prefixes(messages)
        except (TemplateError, TypeError, KeyError) as error:
            reason = str(error).split("\n", 1)[0]
            raise self._refused(messages, f"is refused by the chat template ({reason}); mend or remove it") from error
        if len(ids) > self._length:
            return np.zeros(0, self.dtype), np.zeros(0, np.uint8)
        marks = np.where(answers, 0, CONTEXT).astype(np.uint8)
        marks[:1] |= BEGINS
        return np.asarray(ids, dtype=self.dtype), marks

    def _by_markers(self, messages: list[Message]) -> tuple[list[int], np.ndarray]:
        options: Any = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        made: Any = self._tokenizer.apply_chat_template(messages, **options)
        return made["input_ids"], np.asarray(made["assistant_masks"], dtype=bool)

    def _by_prefixes(self, messages: list[Message]) -> tuple[list[int], np.ndarray]:
        text = self._render(messages)
        made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(made["input_ids"])
        first = np.asarray([start for start, _ in made["offset_mapping"]])
        spans = list(self._spans(messages, text))
        answers = np.zeros(len(ids), dtype=bool)
        bounds = [*(start for start, _ in spans), len(text)]
        for (start, stop), following in zip(spans, bounds[1:], strict=True):
            here = (first >= start) & (first < (following if stop is None else stop))
            ends = np.flatnonzero(here & (ids == self._tokenizer.eos_token_id))
            if stop is None and not len(ends):
                raise self._untold(messages)
            here[ends[0] + 1 if len(ends) else len(ids) :] = False
            answers |= here
        return made["input_ids"], answers

    def _spans(self, messages: list[Message], text: str) -> Iterator[tuple[int, int | None]]:
        """Characters of `text` where each answer begins and, where prefixes say so, where it ends. What the assistant
        says before anybody else is no answer."""
        for at, message in enumerate(messages):
            if message["role"] != "assistant" or not at:
                continue
            before = self._render(messages[:at], prompt=True)
            if not text.startswith(before):
                raise self._untold(messages)
            through = self._render(messages[: at + 1])
            yield len(before), len(through) if text.startswith(through) else None

    def _render(self, messages: list[Message], *, prompt: bool = False) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _refused(self, messages: list[Message], what: str) -> UsageError:
        content = str(messages[0].get("content"))
        shown = content if len(content) <= _SHOWN else content[:_SHOWN] + "..."
        return UsageError(f"{self._name}: the conversation that begins {shown!r} {what}")

    def _untold(self, messages: list[Message]) -> UsageError:
        return self._refused(
            messages,
            "shows that the chat template writes a conversation's beginning anew as it grows, so that the assistant's "
            "tokens cannot be told; mark them in the template with {% generation %} and {% endgeneration %}",
        )


def chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The tokenizer's own. Raises UsageError where it has none, or cannot say where its tokens stand in a text."""
    if not tokenizer.chat_template:
        raise UsageError(
            f"{name} holds conversations, but the tokenizer has no chat template; set `tokenizer` to that of an "
            "instruct model with the source's vocabulary, or text_column to a column with text"
        )
    if not tokenizer.is_fast:
        raise UsageError(
            f"{name} holds conversations, whose tokens only a fast tokenizer can place in a text; set `tokenizer` to a "
            "folder with tokenizer.json"
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UsageError(
            f"{name} holds conversations, but of the tokenizer's chat templates ({', '.join(tokenizer.chat_template)}) "
            "none is named default; give that name to the one to use"
        ) from error


def messages_of(record: Any, name: str) -> list[Message]:
    """The messages of a record, a list of mappings or that as JSON; keys without a value fall out, which a table gives
    to all that lack them. [] where there are none. Raises UsageError for one without role and content."""
    try:
        messages = json.loads(record) if isinstance(record, str) else record
    except ValueError as error:
        raise UsageError(f"{name}: a conversation is no valid JSON ({error}); mend or remove it") from error
    found = []
    for message in messages or []:
        held = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        if "role" not in held or not ("content" in held or "tool_calls" in held):
            has = (", ".join(held) or "no key") if isinstance(message, dict) else f"the form {type(message).__name__}"
            raise UsageError(f"{name}: a message has {has}, not role and content; bring conversations into that form")
        found.append(held)
    return found


def encode_chats(batch: pa.Table, *, encoder: ChatEncoder) -> pa.Table:
    """One column of conversations -> `input_ids`, `marks` (lists) and `digest` (uint64). Those without an answer fall
    out, longer ones than a row are empty."""
    name = encoder._name
    ids, marks, digests = [np.zeros(0, encoder.dtype)], [np.zeros(0, np.uint8)], list[int]()
    for record in batch.column(0):
        messages = messages_of(record.as_py(), name)
        if not messages:
            continue
        own, own_marks = encoder(messages)
        if len(own) and (own_marks & CONTEXT).all():
            continue
        ids.append(own)
        marks.append(own_marks)
        canonical = json.dumps(messages, sort_keys=True).encode()
        digests.append(int.from_bytes(hashlib.sha256(canonical).digest()[:8], "big"))
    offsets = pa.array(np.cumsum([len(each) for each in ids]), type=pa.int32())
    columns = {COLUMN: ids, MARKS: marks}
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(each))) for name, each in columns.items()}
    return pa.table(lists | {DIGEST: pa.array(digests, type=pa.uint64())})
