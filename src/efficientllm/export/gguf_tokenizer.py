"""A transformers tokenizer as llama.cpp reads it: kind, tokens, types, scores or merges, special tokens.

Three of llama.cpp's tokenizers are written:
* gpt2: byte-level BPE by merges (GPT-2, SmolLM, Qwen, Llama 3), with the pre-tokenizer named;
* llama: SentencePiece's BPE, which merges by the score of the product and not by a list, so that the merges must be
  all that the vocabulary allows; characters it does not know become bytes;
* t5: SentencePiece's unigram model, for character vocabularies: no merges, an unknown-token instead of bytes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from efficientllm.errors import UsageError
from efficientllm.models.generation import listed
from efficientllm.models.gguf_pretokenizers import pre_tokenizer_name

SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_AS_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


@dataclass
class Vocabulary:
    """What goes under tokenizer.ggml. Lists run over ids; `ids` holds bos, eos, ... by llama.cpp's names."""

    model: str
    tokens: list[str]
    types: list[TokenType]
    pre: str = "default"
    merges: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    space_prefix: bool | None = None
    ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, stops: list[int]) -> Vocabulary:
    """The tokenizer of a model with `config`, whose generation ends at any of `stops` (may be empty).

    Raises UsageError where llama.cpp would turn text into other tokens; small differences are left in `notes`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            "the tokenizer has no tokenizer.json, which is what is translated; save it as a fast tokenizer"
        )
    content = json.loads(backend.to_str())
    model = content["model"]
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if model["type"] != "BPE" or odd:
        what = f"BPE with {odd[0]}" if odd else model["type"]
        raise UsageError(f"this tokenizer ({what}) cannot be expressed in GGUF by this export; use --to hf")
    _refuse_stripping(content["added_tokens"])
    tokens, types = _tokens(content, config.vocab_size)
    if _is_sentencepiece(content):
        vocabulary = _sentencepiece(content, tokens, types)
    else:
        vocabulary = _byte_level(content, tokens, types)
    _special_tokens(vocabulary, tokenizer, config, stops)
    return vocabulary


def _refuse_stripping(added: list[dict[str, Any]]) -> None:
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags:
            raise UsageError(
                f"the tokenizer's added token {token['content']!r} has {flags[0]}, which GGUF cannot say; set it to "
                "false in tokenizer.json if your text does not depend on it"
            )


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Tokens by id, ids without a token (padding of the embedding) as unused ones."""
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id |= {index: token["content"] for index, token in added.items()}
    if max(by_id) >= size:
        raise UsageError(
            f"the tokenizer has {max(by_id) + 1:,} tokens, the model's embedding {size:,} rows: they do not match"
        )
    tokens, types = [], []
    for index in range(size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(TokenType.UNUSED)
        elif index in added:
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    if len(set(tokens)) < size:
        raise UsageError("the tokenizer has the same token under two ids, which llama.cpp does not take; use --to hf")
    return tokens, types


def _byte_level(content: dict[str, Any], tokens: list[str], types: list[TokenType]) -> Vocabulary:
    model = content["model"]
    notes = []
    normalizer = content["normalizer"]
    if normalizer == {"type": "NFC"}:
        notes.append("the tokenizer brings text to Unicode's NFC form first and llama.cpp does not: give it NFC text")
    elif normalizer is not None:
        raise UsageError(
            f"the tokenizer changes text before it cuts it (normalizer: {normalizer['type']}), which GGUF cannot say; "
            "use --to hf"
        )
    name = pre_tokenizer_name(content["pre_tokenizer"], bool(model.get("ignore_merges")))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if not merges:
        raise UsageError("the tokenizer has no merges, and llama.cpp refuses a byte-level one without; use --to hf")
    return Vocabulary("gpt2", tokens, types, pre=name, merges=merges, notes=notes)


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether spaces become U+2581 and words are not cut apart first."""
    if (content["pre_tokenizer"] or {}).get("type") == "Metaspace":
        return True
    return content["pre_tokenizer"] is None and _AS_SPACE in _normalizers(content)


def _normalizers(content: dict[str, Any]) -> list[dict[str, Any]]:
    normalizer = content["normalizer"]
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


def _space_prefix(content: dict[str, Any], notes: list[str]) -> bool:
    """Whether a space goes before the text. Raises UsageError for normalizers that GGUF cannot say."""
    steps = [step for step in _normalizers(content) if step != _AS_SPACE]
    metaspace = content["pre_tokenizer"]
    if metaspace is None and steps in ([], [{"type": "Prepend", "prepend": SPACE}]):
        return bool(steps)
    if metaspace and not steps and metaspace.get("replacement") == SPACE and not metaspace.get("split", True):
        prefix: bool = metaspace.get("prepend_scheme", "always") != "never"
        if prefix:
            notes.append(
                "llama.cpp puts a space before the text and after each special token, this tokenizer "
                f"({metaspace.get('prepend_scheme', 'always')}) not where one is already: such text gets other tokens"
            )
        return prefix
    raise UsageError("the tokenizer changes or cuts text in a way that GGUF cannot say; use --to hf")


def _sentencepiece(content: dict[str, Any], tokens: list[str], types: list[TokenType]) -> Vocabulary:
    model = content["model"]
    notes: list[str] = []
    prefix = _space_prefix(content, notes)
    unknown = model.get("unk_token")
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = TokenType.UNKNOWN
        elif _BYTE.fullmatch(token):
            types[index] = TokenType.BYTE
    ids = {"unk": tokens.index(unknown)} if unknown in tokens else {}
    bytes_known = types.count(TokenType.BYTE) == 256
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    if bytes_known and model.get("byte_fallback"):
        scores = _scores(tokens, pairs)
        return Vocabulary("llama", tokens, types, scores=scores, space_prefix=prefix, ids=ids, notes=notes)
    if bytes_known or pairs or not ids or not model.get("fuse_unk"):
        raise UsageError(
            "the tokenizer does not spell unknown characters in bytes (256 tokens <0x00> to <0xFF> and byte_fallback), "
            "on which llama.cpp would stop; use --to hf"
        )
    notes.append("text of nothing but spaces gets one token less in llama.cpp than in transformers")
    scores = [0.0 if kind == TokenType.UNKNOWN else -1.0 for kind in types]
    return Vocabulary("t5", tokens, types, scores=scores, space_prefix=prefix, ids=ids, notes=notes)


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """Scores (one a token) by which merging the best-scored product first is the same as merging by the list.

    It is where every way to put a token together is in the list, and the ways of one token stand side by side.
    """
    place = {pair: rank for rank, pair in enumerate(pairs)}
    made: dict[str, list[int]] = {}
    for pair, rank in place.items():
        made.setdefault("".join(pair), []).append(rank)
    parts = set(made) | {token for token in tokens if len(token) == 1}
    for token in tokens:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            possible = all(len(part) == 1 or part in parts for part in (left, right))
            if possible and (left, right) not in place:
                raise UsageError(
                    f"the tokenizer never merges {left!r} and {right!r}, llama.cpp would, since {token!r} is a token: "
                    "SentencePiece vocabularies with a merge list of their own cannot be expressed; use --to hf"
                )
    if any(max(ranks) - min(ranks) >= len(ranks) for ranks in made.values()):
        raise UsageError("the tokenizer's order of merges is not one of tokens, which llama.cpp needs; use --to hf")
    return [-float(made[token][0]) if token in made else 0.0 for token in tokens]


def _special_tokens(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, stops: list[int]
) -> None:
    """Ids of special tokens, what is put around a text, the chat template.

    Where nothing else names the tokens that begin and end a text, the model's config.json does.
    """
    stops = stops or listed(getattr(config, "eos_token_id", None))
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stops), None)
    if end is None:
        raise UsageError(
            "no end-of-text token is known, and llama.cpp would take token 11 for it: set eos_token in "
            "tokenizer_config.json, or eos_token_id in config.json"
        )
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else getattr(config, "bos_token_id", None)
    others = [stop for stop in stops if stop != end]
    named = {"bos": begin, "eos": end, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    named |= dict(zip(("eot", "eom"), others, strict=False))
    if len(others) > 2:
        vocabulary.notes.append(f"GGUF has room for three tokens that end a text; {others[2:]} are left out")
    vocabulary.ids |= {key: value for key, value in named.items() if value is not None}
    vocabulary.add_bos, vocabulary.add_eos = _surrounding(tokenizer, begin, end)
    template = tokenizer.chat_template
    vocabulary.chat_template = template.get("default") if isinstance(template, dict) else template


def _surrounding(tokenizer: PreTrainedTokenizerBase, begin: int | None, end: int) -> tuple[bool, bool]:
    """Whether the tokenizer puts begin before and end after a text, seen from what it does."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    for before in (False, True):
        for after in (False, True):
            if full == [begin] * before + plain + [end] * after:
                return before, after
    raise UsageError(
        f"the tokenizer puts the tokens {full} around a text ({plain}), which GGUF cannot say (only bos before and eos "
        "after); use --to hf"
    )
