"""The tokenizer that a GGUF file describes, as the files of a transformers folder.

Built here and not by transformers (`from_pretrained(..., gguf_file=...)`, 5.23), which cuts text as GPT-2 does wherever
it has no expression for the name of the cut, so that SmolLM's digits and the spaces before them become other tokens;
which merges words that llama.cpp takes whole (Llama 3's ignore_merges); which leaves out special tokens that are not
spelled in the byte alphabet (DeepSeek's distilled Qwens); and which replaces the space that SentencePiece files ask for
before every stretch of text by one before the first. What is built here is what llama.cpp does (src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from efficientllm.errors import UsageError
from efficientllm.models.gguf_pretokenizers import pre_tokenizer_named

SPACE = "▁"


def special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """Ids of "bos", "eos", "unk" and "pad", as far as the file has them; what llama.cpp takes where it does not."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    defaults = {"bos": 1, "eos": 2, "unk": 0} if fields.get("tokenizer.ggml.model") == "llama" else {}
    found = {kind: fields.get(f"tokenizer.ggml.{name}_token_id", defaults.get(kind)) for kind, name in names.items()}
    return {kind: int(index) for kind, index in found.items() if index is not None}


def end_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ids of all tokens at which generation ends: end of text, of a turn, of a message."""
    named = [
        special_ids(fields).get("eos"),
        *(fields.get(f"tokenizer.ggml.{each}_token_id") for each in ("eot", "eom")),
    ]
    return list(dict.fromkeys(int(index) for index in named if index is not None))


def write_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the chat template in it.

    fields: the file's metadata by key. Raises UsageError, with the reason as a clause, where the file has no tokenizer
    or one that is not known.
    """
    try:
        _write(fields, folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing more particular, such as for a merge of unknown tokens
        raise UsageError(f"its tokenizer cannot be built: {error}") from error


def _write(fields: Mapping[str, Any], folder: Path) -> None:
    tokens: Sequence[str] = fields.get("tokenizer.ggml.tokens") or ()
    types = list(fields.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise UsageError("it holds no list of tokens")
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UsageError(f"its kind, '{kind}', is neither gpt2 (byte-level BPE) nor llama (SentencePiece)")
    unused = {
        index for index, token in enumerate(tokens) if types[index] == TokenType.UNUSED and token == f"[PAD{index}]"
    }
    vocabulary = {token: index for index, token in enumerate(tokens) if index not in unused}
    if len(vocabulary) + len(unused) < len(tokens):
        raise UsageError("the same token has two ids")
    ids = special_ids(fields)
    names = {name: tokens[index] for name, index in ids.items() if index < len(tokens)}
    build = _byte_level if kind == "gpt2" else _sentencepiece
    tokenizer = build(fields, vocabulary, types, names.get("unk"))
    special = {names[name] for name in ("bos", "eos", "pad") if name in names}
    special |= {token for token, index in vocabulary.items() if types[index] in (TokenType.CONTROL, TokenType.UNKNOWN)}
    plain = [token for token, index in vocabulary.items() if types[index] == TokenType.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(each, normalized=False, special=True) for each in sorted(special)])
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in plain if each not in special])
    tokenizer.post_processor = _around(fields, names, ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as transformers 4 and 5 both know it
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields[f"{fields['general.architecture']}.context_length"]),
    }
    settings |= {f"{name}_token": token for name, token in names.items()}
    if fields.get("tokenizer.chat_template"):
        settings["chat_template"] = fields["tokenizer.chat_template"]
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _byte_level(
    fields: Mapping[str, Any], vocabulary: dict[str, int], types: list[int], unknown: str | None
) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or ()]
    cut, ignore_merges = pre_tokenizer_named(str(fields.get("tokenizer.ggml.pre", "default")))
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    fields: Mapping[str, Any], vocabulary: dict[str, int], types: list[int], unknown: str | None
) -> Tokenizer:
    """Spaces become U+2581 and nothing is cut; characters that are not known become bytes."""
    scores = fields.get("tokenizer.ggml.scores") or ()
    if len(scores) != len(types):
        raise UsageError("it holds no score for each token")
    normal = {token: scores[index] for token, index in vocabulary.items() if types[index] == TokenType.NORMAL}
    model = models.BPE(vocab=vocabulary, merges=_merges(normal), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *steps] if prefix else steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, those of the best-scored tokens first."""
    found = []
    for token, score in scores.items():
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found += [(-score, left, right) for left, right in ways if left in scores and right in scores]
    found.sort(key=lambda way: way[0])  # stable: the ways of one token stay side by side
    return [(left, right) for _, left, right in found]


def _around(fields: Mapping[str, Any], names: Mapping[str, str], ids: Mapping[str, int]) -> Any:
    """What is put before and after a text: bos and eos where the file says so, or where llama.cpp does by itself."""
    by_itself = fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") in (
        "llama3",
        "llama-v3",
        "llama-bpe",
    )
    begins = bool(fields.get("tokenizer.ggml.add_bos_token", by_itself)) and "bos" in names
    ends = bool(fields.get("tokenizer.ggml.add_eos_token", False)) and "eos" in names
    before, after = ["bos"] * begins, ["eos"] * ends
    if not (before or after):
        return processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    first = [names[each] for each in before] + ["$A"] + [names[each] for each in after]
    second = [f"{names[each]}:1" for each in before] + ["$B:1"] + [f"{names[each]}:1" for each in after]
    known = [(names[each], ids[each]) for each in (*before, *after)]
    return processors.TemplateProcessing(single=first, pair=first + second, special_tokens=known)
