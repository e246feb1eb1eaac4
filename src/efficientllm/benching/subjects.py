"""What is measured: from the names on the command line to sources that a runtime loads, checked before any is, and
what follows from their shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from efficientllm.benching.settings import Settings
from efficientllm.errors import UsageError
from efficientllm.export.subject import subject_of
from efficientllm.models.flops import decode_flops, prefill_flops
from efficientllm.models.loading import load_config
from efficientllm.models.space import head_dim_of, space_of

GGUF = ".gguf"
CACHE_ITEM = 2  # bytes of a key or value in llama.cpp's cache, f16 unless asked otherwise


class BenchModel(NamedTuple):
    """A model: as the user names it, what the runtime loads, and what its shape and types say.

    facts: `parameters` (tied ones once), `weight_bytes` as they lie in memory, `prefill_flops` of a prompt token, the
    mean over the prompt, `decode_flops` of one token at the end of the context, `cache_bytes` of one whole sequence,
    `positions` that the model takes at most, `type` of the weights, as PyTorch or as llama.cpp calls it.
    """

    name: str
    source: str
    facts: dict[str, Any]


def subjects(names: list[str], settings: Settings, temporary: Path, say: Callable[[str], None]) -> list[BenchModel]:
    """Raises UsageError for the first name that cannot be measured. temporary: an empty folder for GGUF exports."""
    found = []
    for index, name in enumerate(names):
        if settings.backend == "llamacpp":
            source = str(_gguf_of(name, settings, temporary / str(index), say))
            facts = facts_of_gguf(Path(source), settings.prompt, settings.context)
            _check_positions(name, settings, facts["positions"])
        else:
            source, dtype = _source_of(name), getattr(torch, settings.dtype)
            facts = facts_of_config(config_of(name, settings), settings.prompt, settings.context, dtype)
        found.append(BenchModel(name, source, facts))
    return found


def homes(names: list[str]) -> list[Path]:
    """Folders of the runs among the models, which keep what was measured."""
    own = [subject_of(Path(name)) for name in names if Path(name).is_dir()]
    return [each.folder.parent for each in own if each.facts is not None]


def config_of(name: str, settings: Settings) -> PretrainedConfig:
    """The configuration of a run's model, a transformers folder or a hub model, whose weights are not needed. Raises
    UsageError for a name that is none, or a model that takes no sequence of the length asked for."""
    config = load_config(_source_of(name), what="model", use="measured")
    _check_positions(name, settings, int(config.max_position_embeddings))
    return config


def facts_of_config(config: PretrainedConfig, prompt: int, context: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of a transformers model with all weights and the cache in `dtype`."""
    space = space_of(config)
    parameters = space.num_params(space.widths)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * space.widths.layers
    window = getattr(config, "sliding_window", None)  # as transformers' DynamicCache reads it
    most = [window if window and kind == "sliding_attention" else math.inf for kind in kinds]
    seen, kept = (sum(int(min(context, each - own)) for each in most) for own in (0, 1))
    return {
        "parameters": parameters,
        "weight_bytes": parameters * dtype.itemsize,
        "prefill_flops": prefill_flops(space, 1, prompt) / prompt,
        "decode_flops": decode_flops(space, seen),
        "cache_bytes": 2 * kept * space.widths.kv_heads * head_dim_of(config) * dtype.itemsize,
        "positions": int(config.max_position_embeddings),
        "type": str(dtype).removeprefix("torch."),
    }


def facts_of_gguf(path: Path, prompt: int, context: int) -> dict[str, Any]:
    """Raises UsageError for what is no whole GGUF file, or one whose operations are not known here (experts)."""
    from efficientllm.models.gguf_source import read_gguf, types_of

    fields, every = read_gguf(path, "model")
    tensors = {name: tensor for name, tensor in every.items() if not name.startswith("rope_")}
    if any(len(tensor.shape) > 2 for tensor in tensors.values()):
        raise UsageError(f"{path} holds a mixture of experts, which is not supported")
    size = {name: math.prod(int(length) for length in tensor.shape) for name, tensor in tensors.items()}
    entries = ("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length", "context_length")
    try:
        kind = fields["general.architecture"]
        layers, heads, kv_heads, hidden, positions = (int(fields[f"{kind}.{entry}"]) for entry in entries)
        per_head = sum(int(fields.get(f"{kind}.attention.{each}_length", hidden // heads)) for each in ("key", "value"))
        head = 2 * size["output.weight" if "output.weight" in size else "token_embd.weight"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"{path} is no whole decoder: {error!r} is not as it is in one (an adapter?)") from error
    linear = 2 * sum(size[name] for name, each in tensors.items() if name.startswith("blk.") and len(each.shape) == 2)
    attention = 2 * layers * heads * per_head  # of one query with one key, scores and values
    return {
        "parameters": sum(size.values()),
        "weight_bytes": sum(int(tensor.n_bytes) for tensor in tensors.values()),
        "prefill_flops": linear + attention * prompt + head / prompt,
        "decode_flops": linear + attention * context + head,
        "cache_bytes": layers * kv_heads * per_head * context * CACHE_ITEM,
        "positions": positions,
        "type": types_of(tensors).lower(),
    }


def _check_positions(name: str, settings: Settings, positions: int) -> None:
    if settings.context > positions:
        raise UsageError(
            f"{name} takes {positions} positions at most; --prompt {settings.prompt} and --generate "
            f"{settings.generate} make {settings.context}: lower one of them"
        )


def _source_of(name: str) -> str:
    """What transformers loads for a run, a transformers folder, a GGUF file (dequantised) or a hub id."""
    path = Path(name)
    if path.is_file() and path.suffix != GGUF:
        raise UsageError(f"{name} is a file; name a run, a transformers folder, a .gguf file or a hub id")
    return str(subject_of(path).folder) if path.is_dir() or path.suffix == GGUF else name


def _gguf_of(name: str, settings: Settings, folder: Path, say: Callable[[str], None]) -> Path:
    """The file itself, or a folder's model exported to one."""
    from efficientllm.export.gguf import export_gguf

    path = Path(name)
    if path.suffix == GGUF:
        return path
    mend = "free disk space there, or set TMPDIR to a folder on a larger disk"
    return export_gguf(subject_of(path), settings.dtype, folder / "model.gguf", disk_mend=mend, say=say)
