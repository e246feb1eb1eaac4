"""Parameters, bytes and operations of a model, from its configuration or from the head of its GGUF file."""

from __future__ import annotations

import math
from pathlib import Path

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
    parameters = sum(math.prod(space.shape(spec, space.widths)) for spec in space.params)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * space.widths.layers
    window = getattr(config, "sliding_window", None)  # as transformers' DynamicCache reads it
    most = [window if window and kind == "sliding_attention" else math.inf for kind in kinds]
    seen, kept = (sum(int(min(context, each - own)) for each in most) for own in (0, 1))
    return Facts(
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        prefill_flops=prefill_flops(space, 1, prompt) / prompt,
        decode_flops=decode_flops(space, seen),
        cache_bytes=2 * kept * space.widths.kv_heads * head_dim_of(config) * dtype.itemsize,
        positions=int(config.max_position_embeddings),
        type=str(dtype).removeprefix("torch."),
    )


def facts_of_gguf(path: Path, prompt: int, context: int) -> Facts:
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
        ends = (int(fields.get(f"{kind}.attention.{each}_length", hidden // heads)) for each in ("key", "value"))
        per_head = sum(ends)
        head = 2 * size["output.weight" if "output.weight" in size else "token_embd.weight"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"{path} is no whole decoder: {error!r} is not as it is in one (an adapter?)") from error
    linear = 2 * sum(size[name] for name, each in tensors.items() if name.startswith("blk.") and len(each.shape) == 2)
    attention = 2 * layers * heads * per_head  # of one query with one key, scores and values
    return Facts(
        parameters=sum(size.values()),
        weight_bytes=sum(int(tensor.n_bytes) for tensor in tensors.values()),
        prefill_flops=linear + attention * prompt + head / prompt,
        decode_flops=linear + attention * context + head,
        cache_bytes=layers * kv_heads * per_head * context * CACHE_ITEM,
        positions=positions,
        type=types_of(tensors).lower(),
    )
