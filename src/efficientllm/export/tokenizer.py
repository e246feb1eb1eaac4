"""The tokenizer of a model folder, as transformers loads it, and the tokens that end its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase

from efficientllm.models.generation import listed
from efficientllm.models.loading import load_generation_config, load_tokenizer


def tokenizer_of(folder: Path, say: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """Says so where transformers cuts text otherwise than the folder's tokenizer.json: some of its classes build their
    pre-tokenizer anew. What transformers does counts, since that is how training here has read its text."""
    tokenizer = load_tokenizer(str(folder), what="model")
    backend, file = getattr(tokenizer, "backend_tokenizer", None), folder / "tokenizer.json"
    if backend is not None and file.is_file():
        loaded, there = json.loads(backend.to_str()), json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key in ("normalizer", "pre_tokenizer") if loaded[key] != there.get(key)]
        if differing:
            say(
                f"transformers {transformers.__version__} loads this tokenizer as {type(tokenizer).__name__}, with "
                f"another {' and '.join(differing)} than its tokenizer.json has; the export follows transformers"
            )
    return tokenizer


def end_tokens(folder: Path, say: Callable[[str], None]) -> list[int]:
    """Ids at which generation stops, as the folder's generation config says; none where it says nothing."""
    settings = load_generation_config(str(folder), say)
    return [] if settings is None else listed(settings.eos_token_id)
