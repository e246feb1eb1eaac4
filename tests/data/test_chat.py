"""Conversations: which tokens are the assistant's, whole conversations in rows, beside text in one mixture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from data.corpus_samples import STORIES, load_path, write_jsonl
from efficientllm.data.chat import ChatEncoder, messages_of
from efficientllm.data.corpus import Corpus
from efficientllm.data.rows import BEGINS, CONTEXT
from efficientllm.data.sampling import BatchStream
from efficientllm.errors import UsageError

START, END = "<|im_start|>", "<|im_end|>"
LENGTH = 192
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A thought before the last answer alone, as of models that reason: a conversation up to an earlier answer has one more.
THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ 'hm, ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTED = "{{ messages | length }} messages\n" + PLAIN
NO_END = PLAIN.replace("<|im_end|>", "#")
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}" + PLAIN


@cache
def chat_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(STORIES, vocab_size=300, special_tokens=[START, END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token=END)
    tokenizer.chat_template = template
    return tokenizer


def talk(number: int) -> list[dict[str, str]]:
    """A conversation of its own, of one to three turns, every other one with a system's word before it."""
    turns = [{"role": "system", "content": "Be short."}] if number % 2 else []
    for turn in range(number % 3 + 1):
        turns.append({"role": "user", "content": f"Fox {number}?{'!' * turn}"})
        turns.append({"role": "assistant", "content": f"Zo\u00eb ran {number * (turn + 1)}."})
    return turns


TALKS = [talk(number) for number in range(50)]


def answers(messages: list[dict[str, str]]) -> list[str]:
    """What is to be predicted: each answer, and that it ends; no greeting, which answers nothing."""
    return [m["content"] + END for at, m in enumerate(messages) if m["role"] == "assistant" and at]


def told(ids: np.ndarray, marks: np.ndarray) -> list[str]:
    """The stretches of tokens that are predicted, as text."""
    here = (marks & CONTEXT == 0).astype(int)
    starts, stops = (np.flatnonzero(np.diff(here, prepend=0, append=0) == sign) for sign in (1, -1))
    return [chat_tokenizer().decode(ids[start:stop]) for start, stop in zip(starts, stops, strict=True)]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[list[Corpus], list[Corpus]]]:
    """load_path with a cache of the test's own, a tokenizer that chats, and rows of LENGTH."""
    return partial(load_path, tmp_path / "cache", tokenizer=chat_tokenizer(), sequence_length=LENGTH)


def write_talks(path: Path, talks: Any = TALKS, column: str = "messages") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": at, column: each}) + "\n" for at, each in enumerate(talks)))
    return path


@pytest.mark.parametrize("template", [PLAIN, MARKED, NO_END], ids=["prefixes", "markers", "no EOS"])
def test_the_assistant_s_tokens_are_told(template: str) -> None:
    encoder = ChatEncoder(chat_tokenizer(template), 1000, "talks")
    for messages in [*TALKS, [{"role": "assistant", "content": "Hi."}, *talk(5)]]:
        ids, marks = encoder(messages)
        text = chat_tokenizer(template).apply_chat_template(messages, tokenize=False)
        assert ids.tolist() == chat_tokenizer().encode(text, add_special_tokens=False)
        expected = answers(messages)
        if template == NO_END:
            expected = [each.replace(END, "#\n") for each in expected]
        if template == MARKED and messages[0]["role"] == "assistant":
            expected = ["Hi." + END, *expected]  # as its author has marked it
        assert told(ids, marks) == expected
        assert (marks & BEGINS > 0).tolist() == [True] + [False] * (len(ids) - 1)


def test_an_answer_that_is_rendered_otherwise_later_ends_with_the_eos() -> None:
    ids, marks = ChatEncoder(chat_tokenizer(THOUGHT), 1000, "talks")(TALKS[2])
    *first, last = answers(TALKS[2])
    assert told(ids, marks) == [*first, "hm, " + last]


def make_parquet(folder: Path) -> str:
    """One message has a key more, which the table then gives to all."""
    talks = [[message | {"name": None} for message in messages] for messages in TALKS]
    pq.write_table(pa.table({"messages": talks}), folder / "a.parquet")
    return str(folder / "a.parquet")


def make_saved(folder: Path) -> str:
    datasets.Dataset.from_dict({"conversation": TALKS}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def test_every_format_gives_whole_conversations(tmp_path: Path, load: Any) -> None:
    sources = [str(write_talks(tmp_path / "a.jsonl")), make_parquet(tmp_path)]
    sources.append({"path": make_saved(tmp_path), "text_column": "conversation"})  # type: ignore[arg-type]
    expected = sorted(tuple(ChatEncoder(chat_tokenizer(), LENGTH, "")(messages)[0].tolist()) for messages in TALKS)
    found = []
    for source in sources:
        lines: list[str] = []
        (train,), _ = load(source, validation=str(tmp_path / "a.jsonl"), within_documents=True, say=lines.append)
        rows = train.take(range(len(train)))
        assert rows.shape == (len(train), LENGTH, 3)
        found.append(rows)
        ids, marks = train.rows.take(np.arange(len(train))), train.rows.marks(np.arange(len(train)))
        assert marks is not None
        whole = []
        for row, row_marks in zip(ids, marks, strict=True):
            borders = [*np.flatnonzero(row_marks & BEGINS), LENGTH]
            whole += [tuple(row[a:b].tolist()) for a, b in pairwise(borders)]
        padding = [each for each in whole if set(each) == {chat_tokenizer().eos_token_id}]
        assert sorted(each for each in whole if each not in padding) == expected
        assert sum(map(len, padding)) < 0.15 * rows[..., 0].numel()
        assert (train.documents, train.tokens) == (50, sum(map(len, expected)))
        assert re.search(r"rows of 50 conversations, \d\d% of whose tokens are the assistant's", lines[-2])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_beside_text_in_one_mixture(tmp_path: Path, load: Any) -> None:
    sources = [str(write_talks(tmp_path / "a.jsonl")), {"path": str(write_jsonl(tmp_path / "b.jsonl")), "weight": 1}]
    (chats, text), (held_chats, held_text) = load(sources, validation=0.2)
    stream = BatchStream([chats, text], [chats.weight, text.weight], 16, seed=1)
    batch, of_text = stream.batch(0), torch.tensor([source == 1 for source, _ in stream.rows(0)])
    assert batch.shape == (16, LENGTH, 2)
    assert 0 < int(of_text.sum()) < 16
    ids, labels = batch.unbind(-1)
    assert torch.equal(labels[of_text][:, :-1], ids[of_text][:, 1:])
    assert ((labels[~of_text] != -100).sum(1) < LENGTH // 2).all()
    here = labels[~of_text] != -100
    assert torch.equal(labels[~of_text][here], ids[~of_text].roll(-1, 1)[here])
    assert held_text.take([0]).dim() == 2  # nothing that it would have to say
    assert held_chats.take([0]).shape == (1, LENGTH, 2)
    assert 2 < held_chats.documents < 20
    assert chats.documents + held_chats.documents == 50
    again, _ = load(sources[0], validation=0.2)
    assert torch.equal(again[0].take([0, 1]), chats.take([0, 1]))


def test_longer_ones_than_a_row_are_left_out_and_counted(tmp_path: Path, load: Any) -> None:
    long = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Zo\u00eb " * 299}]
    unanswered = [{"role": "user", "content": "?"}]
    path = write_talks(tmp_path / "a.jsonl", [None, *TALKS[:20], long, None, [], unanswered, *TALKS[20:]])
    lines: list[str] = []
    (train,), _ = load(path, validation=str(path), say=lines.append)
    assert train.documents == 50
    assert "; 1 that are longer than a row are left out" in "\n".join(lines)


def test_a_template_that_changes_makes_other_rows(tmp_path: Path, load: Any) -> None:
    path = write_talks(tmp_path / "a.jsonl")
    keys = {load(path, tokenizer=chat_tokenizer(template))[0][0].key for template in (PLAIN, MARKED, PLAIN)}
    assert len(keys) == 2


def bad_inputs(folder: Path) -> Iterator[tuple[str, Any, str | None, str]]:
    """(case, source, chat template, what the message says)."""
    path = write_talks(folder / "talks.jsonl")
    yield "no template", path, None, "holds conversations, but the tokenizer has no chat template; set `tokenizer`"
    untold = r"begins 'Fox 0\?' shows that the chat template writes .* anew as it grows.*with {% generation %}"
    yield "counted", path, COUNTED, untold
    yield "no end", path, THOUGHT.replace("<|im_end|>", "#"), "begins 'Be short.' shows .* cannot be told"
    yield "strict", path, STRICT, r"that begins 'Be short.' is refused by the chat template \(begin with user\); mend"
    other = [[{"from": "human", "value": "Hi"}]]
    yield "form", write_talks(folder / "form.jsonl", other), PLAIN, "a message has from, value, not role and content"
    mixed = write_talks(folder / "mixed.jsonl", [TALKS[0], "Hi"])
    yield "text", mixed, PLAIN, "mixed.jsonl, line 2: column 'messages' holds str, not a conversation"
    unanswered = write_talks(folder / "silent.jsonl", [TALKS[0][:1]] * 3)
    yield "no answers", unanswered, PLAIN, "silent.jsonl' holds no conversation with an answer of the assistant"
    long = write_talks(folder / "long.jsonl", [[*TALKS[0][:1], {"role": "assistant", "content": "ran " * 299}]])
    yield "long", long, PLAIN, "all 1 conversations are longer than a row of 192 tokens; raise data.sequence_length"
    few = write_talks(folder / "few.jsonl", TALKS[:2])
    yield "few", few, PLAIN, "few.jsonl': its conversations cannot be divided .*; add some, or name data.validation"
    for form, message in (("str", "a"), ("NoneType", None)):
        odd = write_talks(folder / f"{form}.jsonl", [TALKS[0], [message]])
        yield form, odd, PLAIN, f"a message has the form {form}, not role and content; bring conversations into"
    named: Any = {"tools": PLAIN, "rag": PLAIN}
    yield "named", path, named, r"chat templates \(tools, rag\) none is named default; give that name"


def test_bad_input_is_named_with_its_mend(tmp_path: Path, load: Any) -> None:
    for case, source, template, message in bad_inputs(tmp_path):
        with pytest.raises(UsageError) as caught:
            load(source, tokenizer=chat_tokenizer.__wrapped__(template))
        text = str(caught.value)
        assert re.search(message, text), f"{case}: {text}"
        assert "\n" not in text, case
        assert not list((tmp_path / "cache").rglob("*partial*")), case
    with pytest.raises(UsageError, match=r"talks: a conversation is no valid JSON .*; mend or remove it"):
        messages_of("[{", "talks")
