"""A model folder as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio, ...) run.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, written by the `gguf` package of llama.cpp.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig

from efficientllm.errors import UsageError
from efficientllm.export.gguf_architectures import (
    ARCHITECTURES,
    architecture_of,
    context_length,
    entries_of,
    rope_theta,
    rotary_channels,
)
from efficientllm.export.gguf_tensors import (
    K_QUANTS,
    WRITTEN,
    Stored,
    arranged,
    encoded,
    ffn_width,
    layout,
    misfits,
    rope_tensors,
)
from efficientllm.export.gguf_tokenizer import Vocabulary, vocabulary_of
from efficientllm.export.subject import Subject, tokenizer_of
from efficientllm.export.weights import Unfused, Weights
from efficientllm.files import atomic_path, write_atomically
from efficientllm.models.experts import is_mixture
from efficientllm.models.generation import listed
from efficientllm.models.loading import load_generation_config
from efficientllm.models.space import head_dim_of
from efficientllm.reporting.model_card import GGUF, MARK, Card, metadata_of
from efficientllm.reporting.progress import track
from efficientllm.sizes import format_count

QUANTIZER = "llama-quantize"
MARGIN = 1 << 20  # bytes that the metadata and the file system may take besides


def export_gguf(
    subject: Subject,
    kind: str = "f16",
    out: Path | None = None,
    *,
    overwrite: bool = False,
    licence: str | None = None,
    disk_mend: str = "free disk space or choose another place with --out",
    say: Callable[[str], None],
) -> Path:
    """Writes the file, and its card beside it (NAME.md for NAME.gguf), and returns its path.

    kind: f32, f16, bf16, q8_0, ... or a k-quant, of which the f16 that llama.cpp quantises is written. disk_mend: what
    the user can do where the disk refuses.

    Weights go through memory one at a time. Raises UsageError for what llama.cpp cannot run or would read otherwise,
    and where the disk refuses; no half-written file is left, and what stood there is replaced only by a whole one.
    """
    if kind not in (*WRITTEN, *K_QUANTS):
        raise UsageError(
            f"there is no type {kind}; written are {', '.join(WRITTEN)}; by llama.cpp {', '.join(K_QUANTS)}"
        )
    written = "f16" if kind in K_QUANTS else kind
    out = out or subject.home / "gguf" / f"{subject.name}-{written}.gguf"
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file, such as --out {out / (subject.name + '.gguf')}")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists already; name another file with --out, or replace it with --overwrite")
    whole = Weights(subject.folder)
    config = whole.config
    architecture = architecture_of(config)
    weights = whole if ARCHITECTURES[architecture].fused else Unfused(whole)
    stored = layout(weights.shapes, written, architecture, config.num_hidden_layers)
    factors = rope_tensors(config, architecture)
    tokenizer = tokenizer_of(subject.folder, say)
    generation = load_generation_config(str(subject.folder), say)
    ends = listed(generation.eos_token_id) if generation else []
    vocabulary = vocabulary_of(tokenizer, config, ends)
    card = subject.card(config, sum(math.prod(each.shape) for each in stored), licence)
    for note in (*vocabulary.notes, *misfits(config, kind), *_window_note(config, architecture)):
        say(note)

    with _written(out, stored, architecture, disk_mend) as writer:
        _describe(writer, card)
        _hyperparameters(writer, config, architecture)
        _tokenizer(writer, vocabulary)
        writer.add_file_type(WRITTEN[written][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write(writer, weights, stored, architecture, factors)
    _write_card(card, out, GGUF(out.name, written, architecture), say)
    if kind in K_QUANTS:
        result = out.with_name(f"{out.stem.removesuffix('-f16')}-{kind}.gguf")
        command = shlex.join([QUANTIZER, str(out), str(result), kind.upper()])
        say(f"llama.cpp writes {kind} itself, from this f16 file: {command}")
    return out


@contextmanager
def _written(out: Path, stored: list[Stored], architecture: str, mend: str) -> Iterator[gguf.GGUFWriter]:
    """A writer beside `out`, whose file takes that name once it is whole and on the disk.

    Raises UsageError where the disk refuses; after that, or any other exception, nothing of it is left.
    """
    writer = None
    try:
        with atomic_path(out, folder=False, alone=False) as partial:
            _check_space(out, stored)
            writer = gguf.GGUFWriter(partial, architecture)
            yield writer
            writer.close()  # the last bytes leave the buffer here, and a full disk refuses them
    except OSError as error:
        raise UsageError(f"cannot write {out} ({error}); {mend}") from error
    finally:
        with suppress(OSError):
            if writer is not None:
                writer.close()


def _check_space(out: Path, stored: list[Stored]) -> None:
    need, free = sum(each.bytes for each in stored) + MARGIN, shutil.disk_usage(out.parent).free
    if free < need:
        raise OSError(f"it takes {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


def _write(
    writer: gguf.GGUFWriter,
    weights: Weights | Unfused,
    stored: list[Stored],
    architecture: str,
    factors: Mapping[str, np.ndarray],
) -> None:
    """Header, metadata and table of tensors first, then the weights one by one."""
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for each in stored:
        writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), each.bytes, raw_dtype=each.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in factors.values():
        writer.write_tensor_data(values)
    with track("export", sum(each.bytes for each in stored)) as progress:
        for each in stored:
            parts = [arranged(source, weights.read(source), weights.config, architecture) for source in each.sources]
            weight = parts[0] if len(each.shape) == parts[0].ndim else torch.stack(parts)
            writer.write_tensor_data(encoded(weight, each))
            progress.advance(each.bytes)


def _describe(writer: gguf.GGUFWriter, card: Card) -> None:
    """Who made it from what, under general.*"""
    writer.add_type("model")
    writer.add_name(card.title)
    writer.add_description(card.summary)
    writer.add_size_label(format_count(card.parameters))
    writer.add_tags(card.tags)
    if card.licence:
        writer.add_license(card.licence)
    if card.source_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, card.source_name.split("/")[-1])
    if card.base_model:
        writer.add_base_model_organization(0, card.base_model.split("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{card.base_model}")


def _write_card(card: Card, file: Path, about: GGUF, say: Callable[[str], None]) -> None:
    """NAME.md beside NAME.gguf, unless one lies there that no export has written. Not README.md: several files, of
    several types or models, lie in one folder."""
    path = file.with_name(f"{file.name.removesuffix('.gguf')}.md")
    if path.exists() and MARK not in (metadata_of(path).get("tags") or ()):
        say(f"{path} is left as it is, since no export has written it; the file's own metadata says what it is")
        return
    write_atomically(path, card.text(about).encode())


def _window_note(config: PretrainedConfig, architecture: str) -> list[str]:
    length = context_length(config, architecture)
    if length == config.max_position_embeddings:
        return []
    return [
        f"the context is limited to the sliding window of {length} tokens (of "
        f"{config.max_position_embeddings}): llama.cpp attends to everything in such models"
    ]


def _hyperparameters(writer: gguf.GGUFWriter, config: PretrainedConfig, architecture: str) -> None:
    head_dim = head_dim_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config, architecture))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(ffn_width(config))
    if is_mixture(config):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(ffn_width(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(rotary_channels(config))
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for method, value in entries_of(config, architecture):
        getattr(writer, method)(gguf.RopeScalingType(value) if method == "add_rope_scaling_type" else value)


def _tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    for kind, index in vocabulary.ids.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
