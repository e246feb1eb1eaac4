"""Tokens that fall: every text still encodes, by tokens that are left, and what that costs is counted."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from efficientllm.demo.corpus import train_tokenizer
from efficientllm.errors import UsageError
from efficientllm.models.vocabulary import Falling, Merges, cut_tokenizer, named_ids, renumbered, token_bytes

TEXT = "the thread that the thirteen threw, then there: naïve 日本語 123 123\n\n  the other thing\t" * 40


@cache
def byte_level() -> PreTrainedTokenizerFast:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "text.jsonl"
        file.write_text(json.dumps({"text": TEXT + "strength brought brightly"}) + "\n")
        tokenizer = train_tokenizer([file], 340, Path(name) / "tokenizer")
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = "{{ messages }}"
    post = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


@cache
def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece's: spaces are characters, unknown characters become bytes."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeht"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "b"), ("c", "d"), ("ab", "cd"), ("▁", "▁")]
    words += [left + right for left, right in merges]
    model = models.BPE(
        {word: place for place, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<s>",
        clean_up_tokenization_spaces=False,
    )


KINDS = {"byte-level": byte_level, "byte-fallback": with_byte_fallback}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def counts_of(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    return np.bincount(ids_of(tokenizer, text), minlength=len(tokenizer)).astype(float)


@cache
def falling_of(kind: str) -> Falling:
    tokenizer = KINDS[kind]()
    return Merges(tokenizer).falling(counts_of(tokenizer, TEXT))


@cache
def cut(kind: str, share: float) -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    tokenizer, falling = KINDS[kind](), falling_of(kind)
    fallen = falling.ids[: round(share * len(falling.ids))]
    kept = torch.from_numpy(np.setdiff1d(np.arange(len(tokenizer)), fallen))
    return cut_tokenizer(tokenizer, kept), kept


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("kind", list(KINDS))
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("the cdab ▁x\n", max_size=60))
def test_every_text_encodes_by_what_is_left(kind: str, share: float, text: str) -> None:
    if kind == "byte-fallback":
        text = text.replace("▁", "")  # which SentencePiece itself reads as a space
    tokenizer, kept = cut(kind, share)
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    whole = KINDS[kind]()
    assert tokenizer.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(
        kept[torch.tensor(ids, dtype=int)].tolist()
    )
    assert int(token_bytes(tokenizer, len(kept))[torch.tensor(ids, dtype=int)].sum()) == len(text.encode())


def test_settings_stay_and_ids_move_along() -> None:
    whole, (tokenizer, kept) = byte_level(), cut("byte-level", 1.0)
    assert len(tokenizer) == len(kept) == 258  # bytes and the two special tokens
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.eos_token_id == 257 < whole.eos_token_id
    assert tokenizer("the")["input_ids"][0] == 257  # the post-processor's
    assert tokenizer.chat_template == whole.chat_template
    config = {"eos_token_id": [whole.eos_token_id, 0], "pad_token_id": 300, "bos_token_id": None, "vocab_size": 342}
    ids = renumbered(config, kept)
    assert ids == {"eos_token_id": [257, 0], "pad_token_id": None, "bos_token_id": None, "vocab_size": 342}


def test_ids_in_generation_settings_move_along() -> None:
    settings = {
        "eos_token_id": 7,
        "suppress_tokens": [5, 6],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[5, 7], [6, 7]],
        "forced_decoder_ids": [[1, 9], [6, 5]],
        "sequence_bias": [[[5, 9], -2.0], [[6], 1.0]],
        "top_k": 6,
    }
    assert named_ids(settings) == {5, 6, 7, 9}
    assert renumbered(settings, torch.tensor([5, 7, 9])) == {
        "eos_token_id": 1,
        "suppress_tokens": [0],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[0, 1]],
        "forced_decoder_ids": [[1, 2], [6, 0]],
        "sequence_bias": [[[0, 2], -2.0]],
        "top_k": 6,
    }


def test_every_chat_template_stays() -> None:
    whole = copy.deepcopy(byte_level())
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    whole.chat_template = templates
    assert cut_tokenizer(whole, torch.arange(len(whole))).chat_template == templates


def test_added_tokens_beyond_the_model_s_rows_are_left_out() -> None:
    """As an image's is in Gemma 3, and a pad token in many a fine-tune."""
    whole, rows = copy.deepcopy(byte_level()), len(byte_level())
    whole.add_tokens([AddedToken("<|image|>", special=True)])
    kept = torch.arange(rows)[torch.arange(rows) != int(falling_of("byte-level").ids[0])]
    cut = cut_tokenizer(whole, kept)
    assert len(cut) == len(kept)
    assert "<|image|>" not in cut.get_vocab()
    assert cut.decode(ids_of(cut, TEXT)) == TEXT
    assert torch.equal(token_bytes(whole, rows), token_bytes(byte_level(), rows))


def test_costs_are_the_tokens_more_that_the_text_is_made_of() -> None:
    """Where all that may has fallen, exactly its bytes; before that what encoding anew gives, but for what other merges
    then make of the pieces."""
    tokenizer, falling = byte_level(), falling_of("byte-level")
    own = len(ids_of(tokenizer, TEXT))
    assert own * (1.0 + falling.cost(len(falling.ids))) == pytest.approx(len(TEXT.encode()))
    for share in (0.3, 0.6, 0.8):
        more = len(ids_of(cut("byte-level", share)[0], TEXT)) / own - 1.0
        assert more == pytest.approx(falling.cost(round(share * len(falling.ids))), rel=0.25, abs=0.02)


def test_leaves_fall_first_and_rows_without_a_token_before_them() -> None:
    """A token is worth what is made of it: `ab` alone is rare, but `abcd`, which is often, would be made of it."""
    tokenizer = with_byte_fallback()
    place = tokenizer.get_vocab()
    counts = np.zeros(len(place) + 3)
    counts[[place["abcd"], place["▁the"], place["▁▁"]]] = 10.0, 5.0, 1.0
    falling = Merges(tokenizer, held=[len(place) + 1]).falling(counts)
    names = {number: name for name, number in place.items()}
    assert [names.get(each, each) for each in falling.ids.tolist()] == [
        *(len(place), len(place) + 2),
        *("▁▁", "▁the", "the", "th", "abcd", "cd", "ab"),
    ]
    assert (falling.costs * 16.0).tolist() == pytest.approx([0, 0, 1, 5, 5, 5, 10, 10, 10])


def test_all_merges_that_make_a_token_fall_with_it() -> None:
    words = [*"abc", "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    falling = Merges(fast).falling(np.asarray([0.0, 0, 0, 1, 2, 1]))
    assert falling.ids.tolist() == [5, 4, 3]  # abc, whose parts are then seen 1 + 1 and 2 times
    left = json.loads(cut_tokenizer(fast, torch.arange(5)).backend_tokenizer.to_str())["model"]
    assert left["merges"] == [["a", "b"], ["b", "c"]]


def test_a_tokenizer_may_know_more_than_the_model_has_rows() -> None:
    words = [*"abc", "ab", "bc", "abc"]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [("a", "b"), ("b", "c")]))
    tokenizer.add_tokens(["<image>"])
    falling = Merges(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).falling(np.asarray([1.0, 1, 1, 2]))
    assert falling.ids.tolist() == [3]  # ab; bc has no row
    assert falling.costs.tolist() == [0.4]


def test_other_tokenizers_are_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UsageError, match="takes tokens out of a byte-pair encoding, but the tokenizer is another one"):
        Merges(words)
