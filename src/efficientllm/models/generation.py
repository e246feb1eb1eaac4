"""Generation settings that transformers reads from a published folder and yet refuses to write: made fit to save."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

# generate() reads these only with do_sample=True, and these only with num_beams > 1.
_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")
REFUSED = "generation settings that transformers refuses are left out, but for token ids"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def savable(settings: GenerationConfig) -> tuple[GenerationConfig, str | None]:
    """Settings that save_pretrained takes and that generate as these do, and what is different, None where nothing is.

    Sampling values without do_sample=True, and values of beam search without beams, are dropped: generate() does not
    read them, so the text stays the same. Settings that are unfit otherwise keep their token ids alone.
    """
    if _is_savable(settings):
        return settings, None
    plain, dropped = GenerationConfig(), []
    mended = copy.deepcopy(settings)
    unread = [] if mended.do_sample is True else list(_SAMPLING)
    unread += list(_BEAMS) if mended.num_beams in (None, 1) else []
    for name in unread:
        default = getattr(plain, name, None)
        if getattr(mended, name, None) not in (None, default):
            setattr(mended, name, default)
            dropped.append(name)
    for name in _IDS:
        if not _is_token(getattr(mended, name, None), name == "eos_token_id"):
            setattr(mended, name, None)
            dropped.append(name)
    if _is_savable(mended):
        return mended, f"{', '.join(dropped)} in the generation settings, without effect as they stand, are left out"
    return token_ids({name: getattr(mended, name, None) for name in _IDS}), REFUSED


def token_ids(content: Mapping[str, Any]) -> GenerationConfig:
    """Settings of nothing but the token ids in the content of a generation_config.json, as far as they are ids."""
    found = {name: content.get(name) for name in _IDS}
    ids: dict[str, Any] = {name: each for name, each in found.items() if _is_token(each, name == "eos_token_id")}
    return GenerationConfig(**ids)


def _is_savable(settings: GenerationConfig) -> bool:
    """By saving a copy: what is refused differs between versions of transformers."""
    if not all(_is_token(getattr(settings, name, None), name == "eos_token_id") for name in _IDS):
        return False
    trial = copy.deepcopy(settings)
    trial._original_object_hash = None  # what was loaded and not changed is excused, and an export changes it
    try:
        trial.validate(strict=True)
        with tempfile.TemporaryDirectory(prefix="efficientllm-") as folder:
            trial.save_pretrained(folder)
    except OSError:  # of this machine's disk, which the export itself will meet
        return True
    except Exception:  # ValueError, TypeError, ... by version and value
        return False
    return True


def _is_token(value: Any, several: bool) -> bool:
    if several and isinstance(value, list):
        return bool(value) and all(_is_token(each, False) and each is not None for each in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def listed(ids: int | list[int] | None) -> list[int]:
    """Token ids as a configuration names them: one, several or none."""
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
