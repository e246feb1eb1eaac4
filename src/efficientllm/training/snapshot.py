"""A run between two steps as plain tensors and JSON values: what a checkpoint holds, and how it is cut narrower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from efficientllm.models.parts import EMBEDDING_WEIGHT, HEAD_WEIGHT, is_recomputed, recompute
from efficientllm.models.space import empty_model, narrowed_config, of_layers, space_of, widths_of
from efficientllm.models.vocabulary import renumbered
from efficientllm.pruning.contract import LIVE, ORIGIN, PREFIXES, SCORES, TOKENS
from efficientllm.pruning.dimensions import HIDDEN, LAYERS
from efficientllm.pruning.groups import Space
from efficientllm.pruning.ledger import Ledger
from efficientllm.pruning.live import Live, part_of
from efficientllm.pruning.shards import ALONE, World
from efficientllm.pruning.surgery import choose_kept, cut_rows, cut_scores, cut_state
from efficientllm.pruning.tokens import KEPT
from efficientllm.pruning.widths import Widths


@dataclass(kw_only=True)
class Counts:
    """What a run counts, live (TrainState) and saved (Snapshot) alike: optimizer steps done, tokens read in steps,
    tokens of looks at the gradient, operations by part, steps whose loss or gradient was not finite, in all and up to
    now without a good one between. A count that a checkpoint of an earlier version lacks begins as it does here."""

    step: int = 0
    tokens: int = 0
    refresh_tokens: int = 0
    flops: Ledger = field(default_factory=Ledger)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


def counts_of(run: Counts) -> dict[str, Any]:
    """Its counts by name, for another to begin with."""
    return {each.name: copy(getattr(run, each.name)) for each in fields(Counts)}


def saved_counts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint's manifest by name, without those that its version did not have. Earlier ones counted no
    operations, or one number: a sum whose beginning was not counted by parts stays unknown."""
    counts = {each.name: manifest[each.name] for each in fields(Counts) if each.name in manifest}
    parts = counts.get("flops")
    if not isinstance(parts, dict):
        parts = dict.fromkeys((each.name for each in fields(Ledger)), math.nan)
    measured = parts.get("calibration", 0)  # which an earlier version counted apart
    parts = {name: number for name, number in parts.items() if name != "calibration"}
    return counts | {"flops": Ledger(**parts | ({"looks": parts["looks"] + measured} if measured else {}))}


@dataclass
class Snapshot(Counts):
    """A run between two steps, as plain tensors and JSON values.

    weights {name: tensor}; moments {name: {key: tensor}} (AdamW's scalar step count included); pruner tensors and
    facts (None where nothing is pruned), among the tensors `origin_of`. Weights and moments of a run of several
    processes are DTensors. config: the transformers config as a dict.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    pruner_tensors: dict[str, Tensor] = field(default_factory=dict)
    pruner_facts: dict[str, Any] | None = None


def origin_of(space: Space) -> dict[str, Tensor]:
    """Which of the source's layers and residual channels a run's model has, bool (units of the source,), by dimension:
    at first all."""
    return {LAYERS: torch.ones(space.widths.layers).bool(), HIDDEN: torch.ones(space.widths.hidden).bool()}


def config_of(snapshot: Snapshot) -> PretrainedConfig:
    values = dict(snapshot.config)
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def check_masks(snapshot: Snapshot) -> None:
    """Raises ValueError where a run that prunes lacks masks of its model's units, as a version with another table of
    dimensions may have left it."""
    if snapshot.pruner_facts is not None:
        Live.saved(part_of(snapshot.pruner_tensors, LIVE), widths_of(config_of(snapshot)))


def cut(
    snapshot: Snapshot, widths: Widths, source: PretrainedConfig, *, consume: bool = False, ranks: World = ALONE
) -> Snapshot:
    """The snapshot at narrower widths, none below the live ones; its tensors are new.

    source: the config of the model that the run began with; a Llama that passes through a shape which only Mistral
    takes becomes a Llama again where LlamaConfig allows. With `consume` each tensor is dropped from the given
    snapshot once it is cut, so that old and new never stand in memory whole.
    """
    space = space_of(config_of(snapshot))
    if snapshot.pruner_facts is None:
        raise ValueError("only a run that prunes can be cut")
    masks, scores, origin, tokens = (part_of(snapshot.pruner_tensors, prefix) for prefix in PREFIXES)
    if sum(map(len, (masks, scores, origin, tokens))) != len(snapshot.pruner_tensors):
        raise ValueError(f"a tensor of the pruner is none of {PREFIXES}, and would be lost")
    live = Live(masks)
    kept = choose_kept(live, widths)
    weights, moments = cut_state(space, kept, snapshot.weights, snapshot.moments, consume=consume, ranks=ranks)
    tensors = {f"{LIVE}{name}": mask for name, mask in kept.live.items()}
    tensors |= {SCORES + name: score for name, score in cut_scores(scores, kept, space.widths).items()}
    for name, units in origin.items():  # of those that there were, those that stay
        left = units.nonzero().flatten()[kept.units[name]]
        tensors[ORIGIN + name] = torch.zeros_like(units).index_fill(0, left, True)
    tensors |= {TOKENS + name: ids for name, ids in tokens.items()}
    narrow = narrowed_config(source, widths, of_layers(snapshot.config, kept.units[LAYERS].tolist())).to_dict()
    return replace(snapshot, config=narrow, weights=weights, moments=moments, pruner_tensors=tensors)


def cut_tokens(snapshot: Snapshot, kept: Tensor) -> Snapshot:
    """The snapshot with these rows of its vocabulary alone, int64 in rising order, in new tensors, and with its ids of
    special tokens numbered anew; all else as it is."""
    weights, moments, tensors = dict(snapshot.weights), dict(snapshot.moments), dict(snapshot.pruner_tensors)
    for name in {EMBEDDING_WEIGHT, HEAD_WEIGHT} & weights.keys():
        weights[name] = cut_rows(weights[name], kept)
        moments[name] = {key: cut_rows(each, kept) if each.ndim else each for key, each in moments[name].items()}
    tensors[KEPT] = tensors[KEPT][kept] if KEPT in tensors else kept
    config = renumbered(snapshot.config, kept) | {"vocab_size": len(kept)}
    return replace(snapshot, config=config, weights=weights, moments=moments, pruner_tensors=tensors)


def model_of(snapshot: Snapshot, device: torch.device | str) -> PreTrainedModel:
    """A new model of the snapshot's widths around its weights, which are not copied unless the device differs."""
    model = empty_model(config_of(snapshot), device)
    fill_model(model, {name: weight.detach().to(device) for name, weight in snapshot.weights.items()})
    return model


def model_like(old: PreTrainedModel, new: PreTrainedModel) -> PreTrainedModel:
    """The new model in the old one's mode and settings."""
    new.train(old.training)
    new.generation_config, new.config.use_cache = old.generation_config, old.config.use_cache
    new.set_attn_implementation(old.config._attn_implementation)
    if is_recomputed(old):
        recompute(new)
    return new


def fill_model(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Puts weights in the places of an empty model's, uncopied; tied ones stay tied.

    Raises ValueError where one is missing (norm gains are made as ones, and nobody would notice) or has no place.
    """
    found = model.load_state_dict(weights, strict=False, assign=True)
    holes = set(found.missing_keys) - ({HEAD_WEIGHT} if model.config.tie_word_embeddings else set())
    if holes:
        raise ValueError(f"the snapshot lacks {min(holes)}")
    if found.unexpected_keys:
        raise ValueError(f"the model has no place for {found.unexpected_keys[0]}")
    model.tie_weights()
