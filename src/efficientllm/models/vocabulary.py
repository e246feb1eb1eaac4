"""The vocabulary as pruning sees it: which tokens of a BPE tokenizer may fall, in what order, and what is left of it.

A token may fall once no merge that is left has it as a part (it is a *leaf*); with it go all merges that make it. Text
that held it is then made of what these had joined, so that every text still encodes. Tokens that no merge makes never
fall: bytes and characters; nor do added tokens, such as special ones.
"""

from __future__ import annotations

import heapq
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from efficientllm.errors import UsageError
from efficientllm.models.generation import listed

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"  # how SentencePiece writes a space
_ODD = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")


@dataclass(frozen=True)
class Falling:
    """Tokens in the order in which they would fall: ids int64 (tokens,), and what each costs then, in tokens more for
    each token of the text, fp64 (tokens,): what falls before it is made of it, and makes it cost more."""

    ids: np.ndarray
    costs: np.ndarray

    def cost(self, tokens: int) -> float:
        """Tokens more for each token of the text, once so many have fallen."""
        return float(self.costs[:tokens].sum())


class Merges:
    """What the merges of a tokenizer make, by ids. Raises UsageError for one that is no fast, plain BPE.

    held: ids that never fall, whatever makes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held: Collection[int] = ()) -> None:
        content = _content(tokenizer)
        vocabulary: dict[str, int] = content["model"]["vocab"]
        self.made: dict[int, list[tuple[int, int]]] = {}
        for left, right in map(_pair, content["model"]["merges"]):
            self.made.setdefault(vocabulary[left + right], []).append((vocabulary[left], vocabulary[right]))
        self.there = {*vocabulary.values(), *(each["id"] for each in content["added_tokens"])}
        self._held = {*held, *tokenizer.all_special_ids, *(each["id"] for each in content["added_tokens"])}
        self._held |= {vocabulary[word] for word in [content["model"].get("unk_token")] if word in vocabulary}

    def falling(self, counts: np.ndarray) -> Falling:
        """All tokens that may fall, each time the leaf that is seen least, ties to the highest id; before them rows
        without a token, which cost nothing.

        counts: how often each row of the model is seen, fp64 (rows,). Each fall turns a token into the two parts of
        its first merge, which are seen that much more often: one token more for each time that it is seen.
        """
        spare = [row for row in range(len(counts)) if row not in self.there and row not in self._held]
        seen = np.zeros(max(len(counts), 1 + max(self.there)))  # a tokenizer may know more than the model has rows
        seen[: len(counts)] = counts
        total = seen.sum() or 1.0
        uses = Counter(part for pairs in self.made.values() for pair in pairs for part in pair)
        free = {token for token in self.made if token < len(counts) and token not in self._held}
        leaves = [(seen[token], -token) for token in free if not uses[token]]
        heapq.heapify(leaves)
        ids, costs = [*spare], [0.0] * len(spare)
        while leaves:
            cost, negative = heapq.heappop(leaves)
            ids.append(-negative)
            costs.append(cost / total)
            for part in self.made[-negative][0]:
                seen[part] += cost
            bared = [part for pair in self.made[-negative] for part in pair]
            uses.subtract(bared)
            for part in sorted(set(bared)):
                if part in free and not uses[part]:
                    heapq.heappush(leaves, (seen[part], -part))
        return Falling(np.asarray(ids, np.int64), np.asarray(costs, np.float64))


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {"type": f"{type(tokenizer).__name__}, no fast one"})
    odd = [key for key in _ODD if model.get(key)]
    if model["type"] != "BPE" or odd:
        kind = f"BPE with {odd[0]}" if odd else model["type"]
        raise UsageError(
            f"prune.types has vocab, which takes tokens out of a byte-pair encoding, but the tokenizer is another one "
            f"({kind}); leave vocab out"
        )
    return content


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Tensor) -> PreTrainedTokenizerBase:
    """The tokenizer with these ids alone, int64 in rising order, numbered anew in that order; those without a token are
    rows of the model. Settings, special tokens and chat template stay."""
    number = {old: new for new, old in enumerate(kept.tolist())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        _cut(content, number)
        for path in folder.iterdir():  # other forms of the whole vocabulary: vocab.json, merges.txt, tokenizer.model
            if path.is_file() and path.suffix != ".jinja" and path not in (file, settings):  # folders are of templates
                path.unlink()
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        options = json.loads(settings.read_text(encoding="utf-8"))
        if added := options.pop("added_tokens_decoder", None):
            there = {old: each for old, each in added.items() if int(old) in number}
            options["added_tokens_decoder"] = {str(number[int(old)]): each for old, each in there.items()}
        settings.write_text(json.dumps(options, ensure_ascii=False), encoding="utf-8")
        cut = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    cut.name_or_path = tokenizer.name_or_path
    return cut


def _cut(content: dict[str, Any], number: Mapping[int, int]) -> None:
    model = content["model"]
    model["vocab"] = {token: number[old] for token, old in model["vocab"].items() if old in number}
    model["merges"] = [merge for merge in model["merges"] if "".join(_pair(merge)) in model["vocab"]]
    # Added tokens never fall, but some have no row in the model: an image's, or a pad token of training alone.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] in number]
    for token in content["added_tokens"]:
        token["id"] = number[token["id"]]
    if padding := content.get("padding"):
        content["padding"] = padding | {"pad_id": number[padding["pad_id"]]} if padding["pad_id"] in number else None
    _renumber(content.get("post_processor"), number)


def _renumber(step: Any, number: Mapping[int, int]) -> None:
    """The ids that a post-processor puts around a text."""
    for each in (step or {}).get("processors", []):
        _renumber(each, number)
    special = (step or {}).get("special_tokens", {})
    for token in special.values() if isinstance(special, dict) else special:
        token["ids"] = [number[old] for old in token["ids"]]
    for name in ("sep", "cls"):
        if isinstance((step or {}).get(name), list):
            step[name] = [step[name][0], number[step[name][1]]]


def token_bytes(tokenizer: PreTrainedTokenizerBase, rows: int) -> Tensor:
    """UTF-8 bytes of the text that each id stands for, int64 (rows,); 0 of special tokens, which are no text. Tokens
    beyond the model's rows are left out."""
    content, sizes = _content(tokenizer), torch.zeros(rows, dtype=torch.int64)
    by_bytes = '"ByteLevel"' in json.dumps(content["decoder"])
    for token, place in content["model"]["vocab"].items():
        if place >= rows:
            continue
        if by_bytes:  # a character a byte
            sizes[place] = len(token)
        else:
            sizes[place] = 1 if _BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())
    for added in content["added_tokens"]:
        if added["id"] < rows:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return sizes


def _entries(settings: Any) -> list[Any]:
    return list(settings.items()) if isinstance(settings, Mapping) else list(settings or [])


# Generation settings that are lists whose entries hold ids: how to read those of an entry, and an entry with others.
_LISTS: dict[str, tuple[Callable[[Any], list[int]], Callable[[Any, list[int]], Any]]] = {
    "suppress_tokens": (lambda token: [token], lambda _, ids: ids[0]),
    "begin_suppress_tokens": (lambda token: [token], lambda _, ids: ids[0]),
    "bad_words_ids": (list, lambda _, ids: ids),
    "forced_decoder_ids": (lambda pair: [pair[1]], lambda pair, ids: [pair[0], *ids]),  # of (place, id)
    "sequence_bias": (lambda pair: list(pair[0]), lambda pair, ids: [ids, pair[1]]),  # of (ids, weight)
}


def _named_ids(values: Mapping[str, Any]) -> dict[str, list[int]]:
    return {key: listed(value) for key, value in values.items() if key.endswith("_token_id") and value is not None}


def named_ids(values: Mapping[str, Any]) -> set[int]:
    """The ids of tokens that a config, or generation settings, as a dict has."""
    found = {each for ids in _named_ids(values).values() for each in ids}
    return found.union(*(read(entry) for key, (read, _) in _LISTS.items() for entry in _entries(values.get(key))))


def renumbered(values: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """A config, or generation settings, as a dict, with the ids of tokens as they are numbered among those kept; None
    for one that is not there, without the entry of a list that has one."""
    number, changed = {old: new for new, old in enumerate(kept.tolist())}, dict(values)
    for key, ids in _named_ids(values).items():
        there = [number[old] for old in ids if old in number]
        changed[key] = (there if isinstance(values[key], list) else there[0]) if there else None
    for key, (read, written) in _LISTS.items():
        if entries := _entries(values.get(key)):
            left = [entry for entry in entries if all(old in number for old in read(entry))]
            changed[key] = [written(entry, [number[old] for old in read(entry)]) for entry in left] or None
    return changed


def with_vocabulary(config: PretrainedConfig, kept: Tensor) -> PretrainedConfig:
    """The config of a model that has these rows of its vocabulary alone."""
    values = renumbered(config.to_dict(), kept) | {"vocab_size": len(kept)}
    return type(config)(**values)
