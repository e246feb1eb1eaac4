"""Source models and tokenizers from a local folder, a GGUF file or the hub: no pickles, no remote code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from efficientllm.errors import UsageError
from efficientllm.models.experts import prepare
from efficientllm.models.generation import REFUSED, savable, token_ids
from efficientllm.models.space import attention_of, build, check_space, space_of


def located(source: str, what: str) -> str:
    """The source itself where it is a folder that exists or has the form of a hub id (org/name); the folder that a
    GGUF file has been made to (models/gguf_source.py). Raises UsageError."""
    if Path(source).is_dir():
        return source
    if source.lower().endswith(".gguf"):
        try:
            from efficientllm.models.gguf_source import folder_of
        except ImportError as error:
            if (error.name or "").split(".")[0] != "gguf":
                raise
            raise UsageError(f"{what} '{source}' needs the gguf package: pip install \"efficientllm[gguf]\"") from error
        return str(folder_of(Path(source), what))
    parts = source.split("/")
    if len(parts) <= 2 and all(parts) and not source.startswith((".", "/", "~")):
        return source
    raise UsageError(f"{what} '{source}' is neither a folder nor a hub id (org/name); check the path")


def reason_of(error: BaseException) -> str:
    """The line of an error's message that says what is wrong; its type too where the message alone would not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # The validators of transformers' configurations name themselves first and the cause last.
    line = lines[-1] if "alidation error for" in lines[0] else lines[0]
    expected = isinstance(error, OSError | ValueError | KeyError) or line is not lines[0]
    return (line if expected else f"{type(error).__name__}: {line}")[:300]


def load_config(source: str, *, what: str = "source", use: str = "pruned") -> PretrainedConfig:
    """Raises UsageError for a missing, unreadable or unsupported model.

    what, use: how the model is called to the user, and what is to be done with it.
    """
    folder = located(source, what)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its validators raise types of their own, and compute with what they have not checked
        here = "" if Path(folder).is_dir() else "; there is no folder of that name here"  # a path like a hub id
        raise UsageError(f"cannot read the configuration of {what} '{source}': {reason_of(error)}{here}") from error
    space_of(config, use)
    return config


def load_model(
    source: str,
    *,
    random_seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    what: str = "source",
    use: str = "pruned",
) -> PreTrainedModel:
    """The source in `dtype`; with `random_seed` its architecture with fresh weights, in fp32.

    Raises UsageError when files are missing, damaged, not safetensors, or do not fill the architecture.
    """
    config = load_config(source, what=what, use=use)
    if random_seed is not None:
        torch.manual_seed(random_seed)
        return build(config, device)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention_of(config), "use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            located(source, what),
            config=config,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # transformers raises a different type for every way a folder can be damaged
        raise UsageError(f"cannot load the weights of {what} '{source}': {reason_of(error)}") from error
    model, info = loaded
    holes = sorted(info.get("missing_keys", ())) + [str(key) for key in info.get("mismatched_keys", ())]
    if holes:
        raise UsageError(
            f"{what} '{source}' lacks the weight {holes[0]} ({len(holes)} in all); its files are incomplete"
        )
    model.config.use_cache = False
    check_space(space_of(config), model)
    prepare(model)
    return _owning(model.to(device))


def _owning(model: Any) -> Any:
    """The model with weights of its own, copied one by one; ties stay ties.

    On the CPU those of from_pretrained are maps of the file: one that is truncated while they are in use ends the
    process. What has gone to another device is a copy already.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()
    return model


def load_tokenizer(source: str, *, what: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Raises UsageError for a folder without tokenizer. what: "tokenizer" where the user can name one, else what the
    model that it belongs to is called to the user."""
    folder = located(source, what)
    mend = "name one with `tokenizer:` in the recipe" if what == "tokenizer" else "its files lie beside the model's"
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above: OSError, ValueError, ImportError, JSON errors, ...
        raise UsageError(f"cannot load a tokenizer from '{source}': {reason_of(error)}; {mend}") from error


def load_generation_config(source: str, say: Callable[[str], None] | None = None) -> GenerationConfig | None:
    """How the source's authors want it to generate (end-of-turn tokens, sampling); None where they did not say.

    What comes can be saved (models/generation.py). What is left out of it, and a file that cannot be read, is told to
    `say`, or else is a Python warning: a run that has come to its end must not fail over it.
    """
    note: str | None
    tell = say or (lambda note: warnings.warn(note, stacklevel=3))
    try:
        folder = located(source, "source")
    except UsageError as error:
        tell(str(error))
        return None
    file = Path(folder) / "generation_config.json"
    if Path(folder).is_dir() and not file.is_file():
        return None
    try:
        loaded = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # OSError, ValueError, TypeError, ... by the way in which it is damaged
        if not file.is_file():  # a hub model without any
            return None
        content = _json(file)
        if not isinstance(content, dict):
            tell(f"{file} is damaged ({reason_of(error)}): no generation settings are taken from it; copy it anew")
            return None
        settings, note = token_ids(content), f"{REFUSED} ({reason_of(error)})"
    else:
        settings, note = savable(loaded)
    if note:
        tell(f"{source}: {note}")
    return settings


def _json(file: Path) -> Any:
    """None where it holds none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
