"""A vocabulary as GGUF metadata have it becomes the tokenizer that it was, or one that cuts as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import World, tiny_config
from efficientllm.export.gguf_tokenizer import vocabulary_of
from efficientllm.models.gguf_pretokenizers import GPT2, LLAMA3, NAMES, QWEN2
from efficientllm.models.gguf_vocabulary import write_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces before,  two between, and two after  ",
    "tabs\tand\nnew\n\nlines\r\n\r\n   \n x",
    "1 12 123 1234 12345 3.14159 1,000,000  2 0x1F ½ ² ٣٤",
    "it's we'll I'VE they'd 'tis don't ''' '",
    "naïve café Ærøskøbing straße 日本語 中文字符 한국어 Привет שלום नमस्ते 🚀 👨‍👩‍👧 a\u0301 \u200b \u00a0 \ufeff",
    "def f(x):\n    return x ** 2  # twice\n\nclass A:\n\tpass",
    "<|endoftext|>", "text<|endoftext|> more <|endoftext|>", "!!!???...---///\\\\", "      x", "x      ", "\n", "a",
]  # fmt: skip


def digits_first(backend: Tokenizer) -> None:
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)


def by_expression(regex: str, ignore_merges: bool) -> Callable[[Tokenizer], None]:
    def change(backend: Tokenizer) -> None:
        cut = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.model.ignore_merges = ignore_merges

    return change


CUTS = {
    "gpt-2": by_expression(GPT2, False),
    "smollm": digits_first,
    "qwen2": by_expression(QWEN2, False),
    "llama-bpe": by_expression(LLAMA3, True),
    "dbrx": by_expression(LLAMA3, False),
}


def through_a_file(tokenizer: Any, tmp_path: Path, **more: Any) -> Any:
    """A tokenizer as GGUF metadata have it, and built from these."""
    config = tiny_config("llama-gqa", vocab_size=len(tokenizer) + 2)
    there = vocabulary_of(tokenizer, config, [])
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": there.model,
        "tokenizer.ggml.pre": there.pre,
        "tokenizer.ggml.tokens": there.tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in there.types],
        "tokenizer.ggml.merges": there.merges,
        "tokenizer.ggml.scores": there.scores,
        "tokenizer.ggml.add_bos_token": there.add_bos,
        "tokenizer.ggml.add_space_prefix": bool(there.space_prefix),
        "tokenizer.chat_template": there.chat_template,
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    fields |= {f"tokenizer.ggml.{names.get(kind, kind)}_token_id": index for kind, index in there.ids.items()}
    folder = tmp_path / "tokenizer"
    folder.mkdir(exist_ok=True)
    write_tokenizer(fields | more, folder)
    return AutoTokenizer.from_pretrained(folder)


def assert_same_tokenizer(found: Any, want: Any) -> None:
    assert found.get_vocab() == want.get_vocab()
    assert found.added_tokens_decoder.keys() == want.added_tokens_decoder.keys()
    assert (found.bos_token, found.eos_token, found.unk_token, found.pad_token) == (
        want.bos_token, want.eos_token, want.unk_token, want.pad_token,
    )  # fmt: skip
    assert found.chat_template == want.chat_template
    for text in TEXTS:
        ids = want.encode(text)
        assert found.encode(text) == ids, repr(text)
        assert found.decode(ids) == want.decode(ids)
        assert found.decode(ids, skip_special_tokens=True) == want.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", list(NAMES.values()))
def test_a_byte_level_tokenizer_comes_back(world: World, tmp_path: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "tokenizer")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    CUTS[name](backend)
    want = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    want.add_tokens(["<think>"])
    want.add_special_tokens({"pad_token": "<｜pad▁｜>"})  # not spelled in the byte alphabet
    want.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    found = through_a_file(want, tmp_path, **({"tokenizer.ggml.add_bos_token": False} if name == "llama-bpe" else {}))
    assert_same_tokenizer(found, want)
    for text in ("a<think>b", "a<｜pad▁｜>b"):
        assert found.encode(text) == want.encode(text)


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "stories260K"])
def test_real_tokenizers_come_back(tmp_path: Path, name: str) -> None:
    folder = next((SHARED / kind / name for kind in ("tokenizers", "weights") if (SHARED / kind / name).is_dir()), None)
    if folder is None:
        pytest.skip("the tokenizers are not here")
    # Its file, and not AutoTokenizer: transformers 5 gives what calls itself GPT2Tokenizer the cut of GPT-2.
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {key: settings.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    want = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert_same_tokenizer(through_a_file(want, tmp_path), want)


PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "▁abc", "aa", "ca"]
SCORES = [-9.0, -9.0, -9.0, -9.0, -1.0, -3.0, -2.0, -5.0, -4.0, -6.0, -7.0, -8.0]


def merged_by_score(text: str) -> list[str]:
    """llama.cpp's way: of neighbours that make a token those of the best score first, the leftmost of equal ones."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        made = [(SCORES[PIECES.index(a + b)], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in PIECES]
        if not made:
            return parts
        place = -max(made)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def sentencepiece(tmp_path: Path, **more: Any) -> Any:
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *PIECES]
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
        "tokenizer.ggml.scores": [0.0] * 259 + SCORES,
    }
    write_tokenizer(fields | more, tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_a_sentencepiece_vocabulary_merges_by_score(tmp_path: Path) -> None:
    """With what llama.cpp takes where the file does not say: bos before, a space before each stretch of text."""
    tokenizer = sentencepiece(tmp_path)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.text("abc ", min_size=1, max_size=12))
    def agrees(text: str) -> None:
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == ["<s>", *merged_by_score(text)]
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text

    agrees()
    assert tokenizer.tokenize("a</s>abc") == ["▁a", "</s>", *merged_by_score("abc")]
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    bare = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    plain = sentencepiece(tmp_path, **bare, **{"tokenizer.ggml.add_eos_token": True})
    assert plain.convert_ids_to_tokens(plain.encode("a")) == ["a", "</s>"]
