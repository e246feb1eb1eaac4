"""llama.cpp's name for the way in which a byte-level tokenizer cuts text into words before it merges.

llama.cpp has these regular expressions built in and knows them by name, so a tokenizer is expressible where its
structure equals one of them. What a name implies besides (llama.cpp, src/llama-vocab.cpp): whether a word that is in
the vocabulary is taken whole, without merging (ignore_merges).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers

from efficientllm.errors import UsageError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_DIGITS = ("digits",)

# (steps before the bytes, ignore_merges) -> name
NAMES: dict[tuple[tuple[object, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((_DIGITS, GPT2), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
}
# Other names of llama.cpp for the same cut.
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "smaug-bpe": "dbrx"}


def pre_tokenizer_named(name: str) -> tuple[pre_tokenizers.PreTokenizer, bool]:
    """The pre-tokenizer that llama.cpp knows by this name, and whether ignore_merges goes with it.

    Raises UsageError for a name that is not in NAMES, since text would be cut otherwise than the model was trained on.
    """
    name = _ALIASES.get(name, name)
    for (steps, ignore_merges), known in NAMES.items():
        if known == name:
            parts = [_part(step) for step in steps if step != GPT2]
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in steps))
            return pre_tokenizers.Sequence(parts), ignore_merges
    raise UsageError(f"its way to cut text, '{name}', is none of {', '.join([*NAMES.values(), *_ALIASES])}")


def _part(step: object) -> pre_tokenizers.PreTokenizer:
    if step == _DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(str(step)), behavior="isolated")


def pre_tokenizer_name(pre_tokenizer: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    """The name under which llama.cpp knows this `pre_tokenizer` of a tokenizer.json.

    Raises UsageError where it knows none, since it would cut text otherwise than the model was trained on.
    """
    steps = _steps(pre_tokenizer)
    name = NAMES.get((tuple(steps), ignore_merges)) if steps is not None else None
    if name is None:
        kinds = " + ".join(str(part.get("type")) for part in _parts(pre_tokenizer)) or "none"
        raise UsageError(
            f"llama.cpp has no name for this tokenizer's way to cut text (pre_tokenizer: {kinds}"
            f"{', with ignore_merges' if ignore_merges else ''}); it knows those of GPT-2, SmolLM, Qwen2 and Llama 3. "
            "Export with --to hf"
        )
    return name


def _parts(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[object] | None:
    """The cuts in their order, each as its regular expression; None where one of them is of another kind."""
    steps: list[object] = []
    parts = _parts(pre_tokenizer)
    for place, part in enumerate(parts):
        kind, last = part.get("type"), place == len(parts) - 1
        pattern = part.get("pattern") or {}
        if kind == "Digits" and part.get("individual_digits"):
            steps.append(_DIGITS)
        elif kind == "Split" and "Regex" in pattern and part.get("behavior") == "Isolated" and not part.get("invert"):
            steps.append(pattern["Regex"])
        elif kind == "ByteLevel" and last and not part.get("add_prefix_space"):
            steps += [GPT2] if part.get("use_regex", True) else []
        else:
            return None
    return steps if parts and parts[-1].get("type") == "ByteLevel" else None
