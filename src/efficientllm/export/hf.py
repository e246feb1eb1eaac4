"""A model folder as another transformers folder: in the asked dtype, in shards, with tokenizer and model card."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from efficientllm.checkpoint.export import refuse_foreign, save_tokenizer
from efficientllm.errors import UsageError
from efficientllm.export.subject import Subject, tokenizer_of
from efficientllm.export.weights import INDEX, Weights
from efficientllm.files import atomic_path
from efficientllm.models.generation import savable
from efficientllm.models.loading import load_generation_config
from efficientllm.models.space import head_dim_of
from efficientllm.reporting.model_card import README
from efficientllm.reporting.progress import track

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_hf(
    subject: Subject,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    out: Path | None = None,
    *,
    overwrite: bool = False,
    licence: str | None = None,
    say: Callable[[str], None],
) -> Path:
    """Writes the folder and returns its path; one shard is in memory at a time. dtype: a key of DTYPES. max_shard_size:
    such as 5GB or 500MB. out: default: in the run folder.

    Raises UsageError for a damaged or unsupported model, a folder that is taken, and where the disk refuses; the
    folder appears whole or not at all.
    """
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype}; choose one of {', '.join(DTYPES)}")
    out = (out or subject.home / "hf" / subject.name).resolve()
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists already; name another folder with --out, or replace it with --overwrite")
    if out == subject.folder or out in subject.folder.parents:
        raise UsageError(f"{out} holds the model that is exported; name another folder with --out")
    refuse_foreign(out)
    weights = Weights(subject.folder)
    tokenizer = tokenizer_of(subject.folder, say)
    _note_serving(weights.config, say)
    parameters = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    own = subject.folder / README  # a model of no run keeps the card that it has, in whatever encoding
    if subject.facts is None and own.is_file():
        card = own.read_text(encoding="utf-8", errors="replace")
    else:
        card = subject.card(weights.config, parameters, licence).text()
    generation = load_generation_config(str(subject.folder), say)
    try:
        with atomic_path(out, alone=False) as partial:
            _write_weights(weights, partial, DTYPES[dtype], max_shard_size)
            _write_configs(weights.config, generation, partial, DTYPES[dtype])
            save_tokenizer(tokenizer, partial)
            (partial / README).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write {out} ({error}); free disk space or choose another place with --out") from error
    return out


def _note_serving(config: PretrainedConfig, say: Callable[[str], None]) -> None:
    heads, size = config.num_attention_heads, head_dim_of(config)
    if config.model_type == "qwen2" and heads * size != config.hidden_size:
        say(
            f"vLLM takes {config.hidden_size} / {heads} (hidden size / heads) for the head size of a Qwen2, here "
            f"{size}, and would serve another model: use GGUF, or keep hidden = heads x {size} (docs/export.md)"
        )


def _write_weights(weights: Weights, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in weights.shapes.items()}
    try:
        plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UsageError(f"--max-shard-size {max_shard_size} is no size; write it as 5GB or 500MB") from error
    with track("export", len(planned)) as progress:
        for file, names in plan.filename_to_tensors.items():
            shard: dict[str, Tensor] = {}
            for name in names:
                shard[name] = _cast(name, weights.read(name), dtype)
                progress.advance()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype)
    if not torch.isfinite(cast).all():
        raise UsageError(f"{name} holds values beyond the range of {dtype}; choose --dtype bfloat16 or float32")
    return cast.contiguous()


def _write_configs(
    config: PretrainedConfig, generation: GenerationConfig | None, folder: Path, dtype: torch.dtype
) -> None:
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.use_cache = True
    config.save_pretrained(folder)
    if generation is None:
        generation, _ = savable(GenerationConfig.from_model_config(config))
    generation.use_cache = True
    generation.save_pretrained(folder)
