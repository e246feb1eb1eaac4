"""A run's model as an ordinary transformers folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.checkpoint.store import disk_errors
from efficientllm.errors import UsageError
from efficientllm.files import atomic_path
from efficientllm.models.generation import savable

OURS = frozenset({".json", ".safetensors", ".md", ".model", ".txt", ".jinja"})  # what a model folder is made of


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    generation: GenerationConfig | None = None,
    extras: Callable[[Path], object] | None = None,
) -> None:
    """Writes config, safetensors, generation config and tokenizer; `extras` may add files before it appears, and its
    errors are its own.

    Plain `AutoModelForCausalLM.from_pretrained(folder)` loads it, with no code of ours. Tied embeddings stay tied:
    the LM head is not written. `generation` defaults to what follows from the config. Raises UsageError when the
    disk refuses; what stood there before is then intact.
    """
    config, generation_before = model.config, model.generation_config
    folder = folder.resolve()
    refuse_foreign(folder)
    with ExitStack() as whole:
        with disk_errors(f"the model to {folder}", mend="free disk space or choose another"):
            partial = whole.enter_context(atomic_path(folder))
            try:
                model.config = copy.deepcopy(config)
                model.config.use_cache = True
                model.generation_config, _ = savable(generation or GenerationConfig.from_model_config(model.config))
                model.generation_config.use_cache = True
                model.save_pretrained(partial, max_shard_size="5GB")
            finally:
                model.config, model.generation_config = config, generation_before
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
        if extras is not None:
            extras(partial)
        with disk_errors(f"the model to {folder}", mend="free disk space or choose another"):
            whole.close()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer so that transformers 4 loads it too: it knows version 5's generic class by its old name."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def refuse_foreign(folder: Path) -> None:
    """Raises UsageError where replacing the folder would delete what no export has written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"cannot write the model to {folder}: it is a file; choose another folder")
    foreign = sorted(path.name for path in folder.iterdir() if path.is_dir() or path.suffix not in OURS)
    if foreign:
        raise UsageError(f"{folder} holds {foreign[0]}, which an export would delete; choose a new or empty folder")
    names = {path.name for path in folder.iterdir()}
    weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if names and not ("config.json" in names and weights):
        raise UsageError(
            f"{folder} holds {min(names)} and is no model folder (config.json and safetensors); an export would delete "
            "it: choose a new or empty folder"
        )
