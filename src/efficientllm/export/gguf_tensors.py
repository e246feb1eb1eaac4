"""Weights as llama.cpp wants them: names, the order of rotary rows, and the type that each matrix is stored in.

Some of llama.cpp's architectures rotate neighbouring pairs of a head's channels, transformers channel i with channel
i + head_dim / 2. So the rows of q and k (and their biases) are reordered for them (gguf_architectures.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from efficientllm.errors import UsageError
from efficientllm.export.gguf_architectures import ARCHITECTURES, query_factor, rope_theta
from efficientllm.models.experts import ROUTER
from efficientllm.models.families import FAMILIES
from efficientllm.models.parts import EMBEDDING_WEIGHT, HEAD_WEIGHT
from efficientllm.models.space import head_dim_of, rope_kind, rope_of, widths_of

BLOCK = 32  # row lengths of all types that are written here
SUPER_BLOCK = 256  # of the k-quants, which llama.cpp writes itself
WRITTEN = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# And what most of their matrices become where a row is a multiple of 32 and not of 256, as measured with the quantiser
# of llama-cpp-python 0.3.36 (tests/export/test_llamacpp.py).
K_QUANTS = {
    "q2_k": "q4_0",
    "q3_k_s": "q4_0",
    "q3_k_m": "q4_0",
    "q3_k_l": "q4_0",
    "q4_k_s": "q5_0",
    "q4_k_m": "q5_0",
    "q5_k_s": "q5_1",
    "q5_k_m": "q5_1",
    "q6_k": "q8_0",
}


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads x head_dim, ...) of q or k, from halves (0, 1, ..., d/2, ...) to pairs (0, d/2, 1, d/2 + 1, ...)."""
    rows = weight.shape[0] // heads
    halves = weight.reshape(heads, 2, rows // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def arranged(name: str, weight: Tensor, config: PretrainedConfig, architecture: str) -> Tensor:
    """A weight, by its transformers name, as the architecture wants it: its rows in its order, gains whole, queries
    scaled for what it divides the scores by."""
    rows, family = ARCHITECTURES[architecture], FAMILIES[config.model_type]
    if rows.paired and ".q_proj." in name:
        weight = paired(weight, config.num_attention_heads)
    if rows.paired and ".k_proj." in name:
        weight = paired(weight, config.num_key_value_heads)
    if family.offset and "norm" in name:
        weight = weight.float() + family.offset
    if rows.query and f".{rows.query}." in name:
        weight = weight * query_factor(config, rows)
    return weight


def rope_tensors(config: PretrainedConfig, architecture: str) -> dict[str, np.ndarray]:
    """Weights of a file that say how the rotary frequencies are divided, fp32 (rotated channels / 2,), by name: none,
    Llama 3's, or one set for contexts within the original length and one for longer ones (LongRoPE)."""
    if rope_kind(config) == "longrope" and "longrope" in ARCHITECTURES[architecture].rope_kinds:
        rope = rope_of(config)
        sets = {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
        return {name: np.asarray(values, dtype=np.float32) for name, values in sets.items()}
    factors = rope_factors(config, architecture)
    return {} if factors is None else {"rope_freqs.weight": factors.numpy()}


def rope_factors(config: PretrainedConfig, architecture: str) -> Tensor | None:
    """Divisors of the rotary frequencies (head_dim / 2, fp32), or None where the frequencies are the plain ones.

    Llama 3's scaling is a fixed divisor for each frequency. Raises UsageError for other kinds of scaling.
    """
    kind = rope_kind(config)
    if kind == "default" or kind in ARCHITECTURES[architecture].rope_kinds:
        return None
    if kind != "llama3" or not ARCHITECTURES[architecture].scaled:
        raise UsageError(
            f"rope scaling of type '{kind}' in a {config.model_type} model is not written to GGUF (only llama3, in "
            "Llama and Mistral models); export with --to hf"
        )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    places = torch.arange(0, head_dim_of(config), 2, dtype=torch.int64).float()
    plain = 1.0 / rope_theta(config) ** (places / head_dim_of(config))
    return plain / scaled


@dataclass(frozen=True)
class Stored:
    """How one weight lies in the file. `shape` is transformers' (outputs, inputs); GGUF lists it the other way.
    sources: the weights that it is made of, one an expert, or the one that it is."""

    sources: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def source(self) -> str:
        return self.sources[0]

    @property
    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


def layout(shapes: Mapping[str, tuple[int, ...]], kind: str, architecture: str, layers: int) -> list[Stored]:
    """Every weight with its name and type, in the order of `shapes`; the matrices of a layer's experts as one.

    Vectors (norms, biases) stay f32, and routers, which choose. Where a row is no multiple of 32 the
    matrix is f16, as llama.cpp has it. The
    matrix that the logits come from is q8_0 at least: at 4 or 5 bits it costs far more than it saves.
    """
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, layers)
    head = HEAD_WEIGHT if HEAD_WEIGHT in shapes else EMBEDDING_WEIGHT
    together: dict[str, list[str]] = {}
    for source in shapes:
        together.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", source), []).append(source)
    stored = []
    for whole, sources in together.items():
        name = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"{whole} has no name in llama.cpp"
        shape = shapes[sources[0]]
        kind_of = Type.F32 if whole.endswith(ROUTER) else _type_of(shape, WRITTEN[kind][0], whole == head)
        stored.append(Stored(tuple(sources), name, (len(sources), *shape) if whole != sources[0] else shape, kind_of))
    return stored


def _type_of(shape: tuple[int, ...], asked: Type, is_head: bool) -> Type:
    if len(shape) == 1:
        return Type.F32
    block, _ = gguf.GGML_QUANT_SIZES[asked]
    if shape[-1] % block:
        return Type.F16
    return Type.Q8_0 if is_head and block > 1 else asked


def encoded(weight: Tensor, stored: Stored) -> np.ndarray:
    """The weight as the file holds it: f32, f16, or uint8 for all other types. Raises UsageError beyond f16's range."""
    if stored.type == Type.F16 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise UsageError(f"{stored.source} holds values beyond the range of f16; choose --type bf16 or f32")
    return gguf.quants.quantize(weight.to(torch.float32).contiguous().numpy(), stored.type)


def ffn_width(config: PretrainedConfig) -> int:
    """FFN channels, of an expert where there are some."""
    counts = widths_of(config).counts()
    return counts.get("intermediate") or counts["expert_intermediate"]


def row_lengths(config: PretrainedConfig) -> dict[str, int]:
    """The three lengths that rows of matrices have, by what they are called."""
    return {
        "hidden size": config.hidden_size,
        "FFN width": ffn_width(config),
        "heads x head_dim": config.num_attention_heads * head_dim_of(config),
    }


def misfits(config: PretrainedConfig, kind: str) -> list[str]:
    """One sentence for every row length that `kind` (a key of WRITTEN or of K_QUANTS) cannot pack."""
    block = SUPER_BLOCK if kind in K_QUANTS else gguf.GGML_QUANT_SIZES[WRITTEN[kind][0]][0]
    said = []
    for what, length in row_lengths(config).items():
        if length % block == 0:
            continue
        larger = K_QUANTS[kind] if kind in K_QUANTS and length % BLOCK == 0 else "f16"
        heads = "only another number of heads avoids it (head_dim is the source's)"
        mend = heads if what.startswith("heads") else f"a run with prune.align={block} avoids it"
        said.append(
            f"{what} {length} is no multiple of {block}: matrices with such rows become {larger} instead of {kind}; "
            f"{mend}"
        )
    return said
