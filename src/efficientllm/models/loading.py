"""Source models and tokenizers from a local folder or the hub: safetensors only, remote code only when asked for."""

from __future__ import annotations

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
from efficientllm.models.space import build, check_space, space_of


def _located(source: str, what: str) -> str:
    """The source itself, once it is a folder that exists or has the form of a hub id (org/name)."""
    if Path(source).is_dir():
        return source
    parts = source.split("/")
    if len(parts) <= 2 and all(parts) and not source.startswith((".", "/", "~")):
        return source
    raise UsageError(f"{what} '{source}' is neither a folder nor a hub id (org/name); check the path")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def load_config(source: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Raises UsageError for a missing, unreadable or unsupported model."""
    _located(source, "source")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read the configuration of source '{source}': {_first_line(error)}") from error
    space_of(config)
    return config


def load_model(
    source: str,
    *,
    random_seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The source in `dtype` with SDPA attention; with `random_seed` its architecture with fresh weights, in fp32.

    Raises UsageError when files are missing, damaged, not safetensors, or do not fill the architecture.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    if random_seed is not None:
        torch.manual_seed(random_seed)
        return build(config, device)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, output_loading_info=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # transformers raises a different type for every way a folder can be damaged
        raise UsageError(f"cannot load the weights of source '{source}': {_first_line(error)}") from error
    model, info = loaded
    holes = sorted(info.get("missing_keys", ())) + [str(key) for key in info.get("mismatched_keys", ())]
    if holes:
        raise UsageError(
            f"source '{source}' lacks the weight {holes[0]} ({len(holes)} in all); its files are incomplete"
        )
    model.config.use_cache = False
    check_space(space_of(config), model)
    return _owning(model).to(device)


def _owning(model: Any) -> Any:
    """The model with weights of its own, copied one by one; ties stay ties.

    Those of from_pretrained are maps of the file: a file that is truncated while they are in use ends the process, and
    their addresses, which decide on the order of some sums, are the file's.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()
    return model


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Raises UsageError for a folder without tokenizer."""
    _located(source, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above: OSError, ValueError, ImportError, JSON errors, ...
        raise UsageError(
            f"cannot load a tokenizer from '{source}': {_first_line(error)}; name one with `tokenizer:` in the recipe"
        ) from error


def load_generation_config(source: str) -> GenerationConfig | None:
    """How the source's authors want it to generate (end-of-turn tokens, sampling); None where they did not say."""
    try:
        return GenerationConfig.from_pretrained(source)
    except (OSError, ValueError):
        return None
