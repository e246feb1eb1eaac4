"""The weights of a model folder, checked against its configuration and read one tensor at a time."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from efficientllm.errors import UsageError
from efficientllm.models.experts import as_saved
from efficientllm.models.families import FAMILIES
from efficientllm.models.loading import reason_of
from efficientllm.models.parts import EMBEDDING_WEIGHT, HEAD_WEIGHT
from efficientllm.models.space import space_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class _Place:
    file: Path
    shape: tuple[int, ...]


class Weights:
    """Names and shapes of a model folder's weights, and their values on demand: none is kept in memory.

    Raises UsageError for a family that is not supported, and for a folder whose files do not hold exactly the
    weights that its config.json asks for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._places = _places(folder)
        space = space_of(_without_dropout(self.config), "exported")
        wanted = {
            name: shape
            for spec in space.params
            for name, shape in as_saved(spec.name, space.shape(spec, space.widths)).items()
        }
        self._check(wanted)
        self.shapes = wanted

    def _check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in wanted if name not in self._places]
        if missing:
            raise UsageError(
                f"{self.folder} lacks the weight {missing[0]} ({len(missing)} in all); its files are incomplete: copy "
                "or export it anew"
            )
        for name, shape in wanted.items():
            have = self._places[name].shape
            if have != shape:
                raise UsageError(
                    f"{self.folder}: {name} has shape {list(have)}, but its config.json asks for {list(shape)}; the "
                    "two are not of one model"
                )
        ours = {HEAD_WEIGHT} if self.config.tie_word_embeddings else set()  # tied: the embedding once more
        odd = [name for name in self._places if name not in wanted | dict.fromkeys(ours) and "rotary" not in name]
        if odd:
            raise UsageError(
                f"{self.folder} holds the weight {odd[0]}, which a {self.config.model_type} model does not have; "
                "modified architectures are not supported"
            )
        if ours & self._places.keys():
            self._check_tied()

    def _check_tied(self) -> None:
        """A head of its own beside `tie_word_embeddings`: transformers 5 uses it, transformers 4 does not."""
        if not torch.equal(self.read(HEAD_WEIGHT), self.read(EMBEDDING_WEIGHT)):
            raise UsageError(
                f"{self.folder}: config.json ties the embeddings, but its {HEAD_WEIGHT} differs from "
                f"{EMBEDDING_WEIGHT}: what counts "
                'depends on the version of transformers; set "tie_word_embeddings" to false in config.json to keep both'
            )

    def read(self, name: str) -> Tensor:
        """One weight as it lies on the disk. Raises UsageError for values that are not finite."""
        with safe_open(self._places[name].file, framework="pt") as file:
            weight: Tensor = file.get_tensor(name)
        if not torch.isfinite(weight).all():
            raise UsageError(f"{self.folder}: {name} holds values that are not finite; the run diverged, do not use it")
        return weight


class Unfused:
    """The same weights with fused ones taken apart, by the names that the parts have where they are not fused."""

    def __init__(self, weights: Weights) -> None:
        self.config, self._weights = weights.config, weights
        self._parts: dict[str, tuple[str, slice]] = {}  # the weight and the rows of it that a name stands for
        space = space_of(_without_dropout(self.config), "exported")
        axes = {spec.name: spec.axes for spec in space.params}
        for source in weights.shapes:
            fused = next((module for module in FUSED if f".{module}." in source), None)
            if fused is None:
                self._parts[source] = source, slice(None)
                continue
            rows = axes[source][0]
            assert isinstance(rows, tuple)
            lengths = [space.axis_length(axis, space.widths) for axis in rows]
            for part, length, end in zip(FUSED[fused], lengths, itertools.accumulate(lengths), strict=True):
                self._parts[source.replace(fused, part)] = source, slice(end - length, end)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        whole = self._weights.shapes
        return {
            name: (len(range(whole[source][0])[rows]), *whole[source][1:])
            for name, (source, rows) in self._parts.items()
        }

    def read(self, name: str) -> Tensor:
        source, rows = self._parts[name]
        return self._weights.read(source)[rows]


def read_config(folder: Path) -> PretrainedConfig:
    """Raises UsageError for a missing or damaged config.json and for a family that is not supported."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except Exception as error:  # its validators raise types of their own, and compute with what they have not checked
        raise UsageError(f"cannot read {folder / 'config.json'}: {reason_of(error)}") from error
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"models of type '{config.model_type}' cannot be exported; this writes {', '.join(FAMILIES)} models"
        )
    return config


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout, which pruning refuses, says nothing about a model at rest."""
    config = copy.deepcopy(config)
    if getattr(config, "attention_dropout", 0.0):
        config.attention_dropout = 0.0
    return config


def _places(folder: Path) -> dict[str, _Place]:
    """Every tensor in the folder's safetensors, by name. Raises UsageError for missing or damaged files.

    Where there are both a single file and an index, the single file counts, as it does in transformers.
    """
    files = [folder / SINGLE]
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        try:
            files = sorted({folder / name for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"{folder / INDEX} is damaged; copy or export the model anew") from error
    places = {}
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"{folder} lacks {file.name}; copy or export the model anew (only safetensors are read, no .bin files)"
            )
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118  it is no mapping
                    places[name] = _Place(file, tuple(content.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} is damaged ({error}); copy or export the model anew") from error
    return places
