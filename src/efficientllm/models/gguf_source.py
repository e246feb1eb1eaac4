"""A GGUF file as a source: dequantised once to an ordinary transformers folder in the cache.

Weights go from block to fp32 by the `gguf` package of llama.cpp and to their names by its table, and must be exactly
those of the family, so that nothing in a file is passed over. transformers 5.23 (`from_pretrained(gguf_file=...)`) is
not asked: it leaves out what its config does not expect, such as biases in a `llama` file and Llama 3's rotary scaling
(`rope_freqs.weight`), takes Qwen3's head size from a default, refuses the shapes of pruned models, and needs
accelerate. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from efficientllm.cache import cache_root, file_digest
from efficientllm.errors import UsageError
from efficientllm.files import atomic_path, locked
from efficientllm.models.gguf_config import ROPE_FREQUENCIES, Tensors, config_of
from efficientllm.models.gguf_vocabulary import end_ids, special_ids, write_tokenizer
from efficientllm.models.space import space_of

_FORMAT = 1  # of the folders in the cache; a new number makes old ones invisible


def folder_of(file: Path, what: str) -> Path:
    """The folder of a GGUF file's model, made where it is not yet: fp32 safetensors, config, tokenizer.

    It is named by the file's digest, so that a file that has changed is another one. That it is made is said in a line
    on stderr, with the types that the weights were in. Raises UsageError for a file that is missing or damaged or that
    holds something else than a supported model, and where the disk refuses.
    """
    if not file.is_file():
        raise UsageError(f"{what} '{file}': there is no such file; check the path")
    root = cache_root()
    try:
        digest = file_digest(file, root / "digests")
        folder = root / "gguf" / f"{digest[:32]}-{_FORMAT}"
        if not _is_whole(folder):
            with locked(folder.with_suffix(".lock"), lambda: _say(f"{file}: another process dequantises it; waiting")):
                if not _is_whole(folder):
                    _make(file, digest, folder, what)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot keep the dequantised weights of '{file}' in {root} ({error}); free disk space, or set "
            "EFFICIENTLLM_CACHE to a folder on a larger disk"
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _make(file: Path, digest: str, folder: Path, what: str) -> None:
    fields, tensors = read_gguf(file, what)
    with atomic_path(folder, alone=False, keep=_is_whole) as done:
        try:
            config = config_of(fields, tensors)
            _say(f"{file}: {types_of(tensors)} weights are dequantised to fp32, once, in {folder}")
            write_tokenizer(fields, done)
            save_torch_state_dict(_weights(tensors, config, str(fields["general.architecture"])), done)
        except UsageError as error:
            mend = "take the model's transformers folder, or another file"
            raise UsageError(f"{what} '{file}' cannot be used: {error}; {mend}") from error
        config.save_pretrained(done)
        _generation(fields).save_pretrained(done)
        if file_digest(file, cache_root() / "digests") != digest:
            raise UsageError(f"{what} '{file}' changed while it was read; run again once it is complete")


def types_of(tensors: Tensors) -> str:
    """The types of the matrices, such as "Q4_1 and Q8_0", those of most weights first."""
    counts = Counter[str]()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    names = [name for name, _ in counts.most_common()]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def read_gguf(file: Path, what: str) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors, the latter mapped from the file. Raises UsageError for what is no whole model."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UsageError(f"{what} '{file}' is no GGUF file, by its first bytes; name a model file or folder")
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of any type, by what it meets where something else should be
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{what} '{file}' is damaged, incomplete or newer than gguf ({reason}); copy it anew"
        ) from error
    parts = int(fields.get("split.count", 1))
    if parts > 1:
        raise UsageError(f"{what} '{file}' is one of {parts} parts of a model; join them: llama-gguf-split --merge")
    if not reader.tensors:
        raise UsageError(f"{what} '{file}' holds a vocabulary and no weights; name the model's file")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _generation(fields: Mapping[str, Any]) -> GenerationConfig:
    ids, ends = special_ids(fields), end_ids(fields)
    end: Any = ends if len(ends) > 1 else next(iter(ends), None)
    return GenerationConfig(bos_token_id=ids.get("bos"), eos_token_id=end, pad_token_id=ids.get("pad"))


def _weights(tensors: Tensors, config: PretrainedConfig, architecture: str) -> dict[str, Tensor]:
    """All weights in fp32 by transformers' names. Raises UsageError where a tensor lacks or one is left over."""
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names, space = gguf.get_tensor_name_map(key, config.num_hidden_layers), space_of(config)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    left, weights = dict(tensors), {}
    left.pop(ROPE_FREQUENCIES, None)
    for spec in space.params:
        name = names.get_name(spec.name, try_suffixes=(".weight", ".bias"))
        shape = space.shape(spec, space.widths)
        tensor = left.pop(str(name), None)
        if tensor is None or tuple(reversed(tensor.shape.tolist())) != shape:
            have = "lacks" if tensor is None else f"has in another shape than {shape}"
            raise UsageError(f"it {have} {name}, a weight of {config.model_type} models")
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except NotImplementedError as error:
            raise UsageError(f"the gguf package cannot dequantise {tensor.tensor_type.name} ({name})") from error
        weight = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: fp32 ones are maps of the file
        rotated = next((count for part, count in heads.items() if part in spec.name), None)
        if architecture == "llama" and rotated:
            weight = _halves(weight, rotated)
        weights[spec.name] = weight
    if left:
        raise UsageError(f"it holds {next(iter(left))}, which is no weight of {config.model_type} models")
    return weights


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads x head_dim, ...) of q or k, from llama.cpp's rotary pairs to transformers' halves of a head."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
