"""Parameters, bytes and operations of a model, from its configuration or from the head of its GGUF file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from efficientllm.benching.contract import Facts
from efficientllm.errors import UsageError
from efficientllm.models.flops import decode_flops, prefill_flops
from efficientllm.models.space import head_dim_of, space_of

CACHE_ITEM = 2  # bytes of a key or value in llama.cpp's cache, f16 unless asked otherwise


def facts_of_config(config: PretrainedConfig, prompt: int, context: int, dtype: torch.dtype) -> Facts:
    """Of a transformers model with all weights and the cache in `dtype`."""
    space = space_of(config)
    widths = space.widths
    parameters = sum(math.prod(space.shape(spec, widths)) for spec in space.params)
    windows = _windows(config)
    seen = sum(context if window is None else min(context, window) for window in windows)
    kept = sum(context if window is None else min(context, window - 1) for window in windows)
    return Facts(
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        prefill_flops=prefill_flops(space, 1, prompt) / prompt,
        decode_flops=decode_flops(space, seen),
        cache_bytes=2 * kept * widths.kv_heads * head_dim_of(config) * dtype.itemsize,
        context=context,
        positions=int(config.max_position_embeddings),
        type=str(dtype).removeprefix("torch."),
    )


def _windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer; None where it attends to everything. As transformers' DynamicCache reads it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def facts_of_gguf(path: Path, prompt: int, context: int) -> Facts:
    """Raises UsageError for what is no whole GGUF file, or one whose operations are not known here (experts)."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        architecture = str(_value(reader, "general.architecture"))
        layers, heads, kv_heads, hidden, positions = (
            int(_value(reader, f"{architecture}.{key}"))
            for key in (
                "block_count",
                "attention.head_count",
                "attention.head_count_kv",
                "embedding_length",
                "context_length",
            )
        )
        keys = int(_value(reader, f"{architecture}.attention.key_length", hidden // heads))
        values = int(_value(reader, f"{architecture}.attention.value_length", hidden // heads))
        parts = int(_value(reader, "split.count", 1))
    except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"{path} cannot be read as the GGUF file of a decoder ({error})") from error
    if parts > 1:
        raise UsageError(
            f"{path} is one of {parts} parts of a model; make one file of them: llama-gguf-split --merge FIRST OUT.gguf"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors if not tensor.name.startswith("rope_")}
    if any(len(tensor.shape) > 2 for tensor in tensors.values()):
        raise UsageError(f"{path} holds a mixture of experts, which is not supported")
    if "token_embd.weight" not in tensors:
        raise UsageError(f"{path} holds no token embedding, so it is no whole decoder (an adapter or a vocabulary?)")
    size = {name: math.prod(int(length) for length in tensor.shape) for name, tensor in tensors.items()}
    linear = 2 * sum(size[name] for name, each in tensors.items() if name.startswith("blk.") and len(each.shape) == 2)
    head = 2 * size["output.weight" if "output.weight" in size else "token_embd.weight"]
    attention = 2 * layers * heads * (keys + values)  # of one query with one key, scores and values
    return Facts(
        parameters=sum(size.values()),
        weight_bytes=sum(int(tensor.n_bytes) for tensor in tensors.values()),
        prefill_flops=linear + attention * prompt + head / prompt,
        decode_flops=linear + attention * context + head,
        cache_bytes=layers * kv_heads * (keys + values) * context * CACHE_ITEM,
        context=context,
        positions=positions,
        type=_type_of(reader, tensors, size),
    )


def _type_of(reader: Any, tensors: Mapping[str, Any], size: Mapping[str, int]) -> str:
    """As the file calls itself, and what most of its weights are where that is something else."""
    import gguf

    weights: Counter[str] = Counter()
    for name, tensor in tensors.items():
        weights[tensor.tensor_type.name.lower()] += size[name]
    main = weights.most_common(1)[0][0]
    number = _value(reader, "general.file_type", -1)
    known = {int(kind): kind.name.lower().removeprefix("all_").removeprefix("mostly_") for kind in gguf.LlamaFileType}
    named = known.get(number, main)
    return named if named.startswith(main) else f"{named}, mostly {main}"


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is None and default is None:
        raise KeyError(f"{key} is missing")
    return default if field is None else field.contents()
