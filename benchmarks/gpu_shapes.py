"""The models of benchmarks/gpu.py, and the batches of their steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig, PretrainedConfig

from efficientllm.models.flops import forward_flops
from efficientllm.models.space import narrowed_config, space_of
from efficientllm.pruning.shapes import Alignment, proportional_widths
from efficientllm.pruning.widths import Widths

TARGET = 469 / 1711  # share of the parameters that is left in the paper's largest recipe
WIDE = 120e9  # bytes of a device that holds two models of 1.7B in training, with 8,192 tokens in flight


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, length: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Shape:
    """A model and its batch: rows of `length` tokens in a step, `micro` of them in a forward pass."""

    name: str
    config: PretrainedConfig
    rows: int
    micro: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def model_flops(self) -> int:
        """Of a step: three times the forward pass, attention over the whole square (PaLM, arXiv 2204.02311, app. B)."""
        return 3 * forward_flops(space_of(self.config), self.rows, self.length).total

    def narrowed(self, name: str, widths: Widths) -> Shape:
        return replace(self, name=name, config=narrowed_config(self.config, widths))


def shapes_of(names: list[str], device: torch.device, *, tiny: bool, micro: int | None) -> list[Shape]:
    """SmolLM's two shapes (hidden, layers, heads, KV heads, FFN) with 16 rows of 2,048 tokens a step, or a toy."""
    if tiny:
        return [Shape("toy", llama(64, 3, 4, 2, 160, 512, 64), rows=4, micro=micro or 2, length=64)]
    memory = torch.cuda.get_device_properties(device).total_memory
    sizes = {
        "1.7B": (llama(2048, 24, 32, 32, 8192, 49152, 2048), 4 if memory > WIDE else 2),
        "360M": (llama(960, 32, 15, 5, 2560, 49152, 2048), 8 if memory > WIDE else 4),
    }
    return [Shape(name, sizes[name][0], 16, micro or sizes[name][1], 2048) for name in names]


def two_shapes(shape: Shape) -> tuple[Shape, Shape]:
    """A final shape with aligned widths, and one of as many parameters (within 0.2 %) whose widths are odd numbers."""
    space = space_of(shape.config)
    align = Alignment.automatic(space.widths)
    target = round(TARGET * int(space.num_params()))
    near = proportional_widths(space, target)
    hidden = max(align.hidden, near.hidden // align.hidden * align.hidden)
    most = range(align.intermediate, space.widths.intermediate + 1, align.intermediate)
    aligned = max(
        (near.changed(hidden=hidden, intermediate=ffn) for ffn in most),
        key=lambda widths: -abs(int(space.num_params(widths)) - target),
    )
    wanted = int(space.num_params(aligned))
    odd = min(
        (aligned.changed(hidden=hidden - 3, intermediate=ffn) for ffn in range(1, space.widths.intermediate, 2)),
        key=lambda widths: abs(int(space.num_params(widths)) - wanted),
    )
    return shape.narrowed("aligned", aligned), shape.narrowed("unaligned", odd)
