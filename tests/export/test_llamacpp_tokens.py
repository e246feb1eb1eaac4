"""Exported vocabularies in the real runtime: llama.cpp cuts text into the tokens that transformers cuts it into.

Skips itself where llama-cpp-python is not installed (`pip install "efficientllm[llamacpp]"` builds it from source).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="the gguf package is not installed")

from efficientllm.models.gguf_pretokenizers import LLAMA3, NAMES, QWEN2  # noqa: E402
from export.llamacpp_runtime import DATA, plain_kernels, runtime, to_gguf  # noqa: E402, F401

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces before,  two between, and two after  ",
    "tabs\tand\nnew\n\nlines\r\n\r\n   \n x",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ½ ² ٣٤",
    "it's we'll I'VE they'd 'tis don''t ''' '",
    "naïve café Ærøskøbing ÀÉÎÕÜ straße",
    "日本語のテキスト 中文字符 한국어",
    "Привет, мир! Γειά σου שלום مرحبا नमस्ते ไทย",
    "emoji 🚀🌍 👨‍👩‍👧‍👦 🏳️‍🌈 ☺️ 🇩🇪",
    "def f(x):\n    return x ** 2  # twice\n\nclass A:\n\tpass",
    "<div class='a'>&nbsp;</div> {\"k\": [1, 2.5e-3, null]}",
    "a\u0301 e\u0302 \u200b zero\u00a0width\u2003space \ufeff",
    "<|endoftext|>", "text<|endoftext|> more <|endoftext|>", "<s> a </s><unk>b",
    "!!!???...---___***///\\\\", "      x", "x      ", "\n", "a", "▁ ▁▁x", "\x00\x01\x7f",
]  # fmt: skip


def llama3_like(tokenizer: PreTrainedTokenizerFast, regex: str, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """The same merges after another cut of the text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    cut = pre_tokenizers.Split(Regex(regex), behavior="isolated", invert=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.model.ignore_merges = ignore_merges
    return wrapped(tokenizer, backend)


def wrapped(tokenizer: Any, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that transformers loads as it is saved."""
    end = tokenizer.eos_token
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=end)


def saved_tokenizers(folder: Path) -> dict[str, Path]:
    """Real vocabularies under every pre-tokenizer that is known by name, and the two SentencePiece ones."""
    paths = {}
    gpt2 = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")
    smollm = Tokenizer.from_file(str(DATA / "tokenizers" / "smollm2" / "tokenizer.json"))
    smollm.no_truncation()
    made = {
        "gpt-2": gpt2,
        "smollm": wrapped(AutoTokenizer.from_pretrained(DATA / "tokenizers" / "smollm2"), smollm),
        "qwen2": llama3_like(gpt2, QWEN2, False),
        "llama-bpe": llama3_like(gpt2, LLAMA3, True),
        "dbrx": llama3_like(gpt2, LLAMA3, False),
    }
    for name, tokenizer in made.items():
        paths[name] = folder / name
        tokenizer.save_pretrained(paths[name])
    return paths | {name: DATA / "weights" / name for name in ("stories260K", "babyllama-0.9M")}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, Any]]]:
    """By name: llama.cpp's reading of the exported vocabulary, and transformers' tokenizer."""
    if not (DATA / "tokenizers").is_dir():
        pytest.skip("the tokenizers are not here")
    from conftest import tiny_model

    folder, loaded = tmp_path_factory.mktemp("vocabularies"), {}
    for name, path in saved_tokenizers(folder).items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model_folder = folder / f"{name}-model"
        tiny_model("llama-gqa", vocab_size=len(tokenizer) + 3, hidden_size=4, tie_word_embeddings=True).save_pretrained(
            model_folder
        )
        tokenizer.save_pretrained(model_folder)
        file = to_gguf(model_folder, folder / f"{name}.gguf", "f16")
        reader = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        loaded[name] = (reader, AutoTokenizer.from_pretrained(model_folder))
    yield loaded
    for reader, _ in loaded.values():
        reader.close()


ALL = [*NAMES.values(), "stories260K", "babyllama-0.9M"]


def assert_same_ids(reader: Any, tokenizer: Any, text: str) -> None:
    want = tokenizer.encode(text, add_special_tokens=False)
    assert reader.tokenize(text.encode(), add_bos=False, special=True) == want, repr(text)


@pytest.mark.parametrize("name", ALL)
def test_texts_become_the_same_tokens(vocabularies: dict[str, tuple[Any, Any]], name: str) -> None:
    reader, tokenizer = vocabularies[name]
    for text in TEXTS:
        assert_same_ids(reader, tokenizer, text)
    if tokenizer.unk_token_id is None or name in NAMES.values():  # nothing is lost: back to the same text
        for text in TEXTS[:10]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert reader.detokenize(ids).decode() == text


PIECES = st.sampled_from(
    ["'s", "'LL", "  ", "\n\n", "\t", "don't", "123", "٤", "é", "e\u0301", "中", "🚀", " the", "<|"]
)
ANY_TEXT = st.lists(
    st.one_of(PIECES, st.text(max_size=6), st.text(st.characters(codec="ascii"), max_size=6)), max_size=8
)


@pytest.mark.parametrize("name", ALL)
def test_any_text_becomes_the_same_tokens(vocabularies: dict[str, tuple[Any, Any]], name: str) -> None:
    reader, tokenizer = vocabularies[name]

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(ANY_TEXT.map("".join))
    def agree(text: str) -> None:
        if name == "babyllama-0.9M" and not text.strip(" "):
            return  # said by the export: one space less where there is nothing else
        assert_same_ids(reader, tokenizer, text)

    agree()


def test_what_goes_around_a_text_and_ends_it(make_model: Any, tmp_path: Path) -> None:
    """A tokenizer that puts bos before the text, a chat template, and a second token that ends a turn."""
    from tokenizers.processors import TemplateProcessing

    folder, _ = make_model("llama-gqa")
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(folder))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    single = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=single)
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    folder, model = make_model("llama-gqa", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    model.generation_config.save_pretrained(folder)
    with runtime(to_gguf(folder, tmp_path / "m.gguf")) as reader:
        assert reader.tokenize(b"the model", add_bos=True) == tokenizer.encode("the model")
        assert reader.token_bos() == tokenizer.bos_token_id
        assert reader.token_eos() == tokenizer.eos_token_id
        assert reader.metadata["tokenizer.ggml.eot_token_id"] == "7"
        assert reader.metadata["tokenizer.chat_template"] == tokenizer.chat_template
