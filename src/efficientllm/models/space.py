"""From a transformers config to what pruning needs: the space, and the config of narrower widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from efficientllm.errors import UsageError
from efficientllm.models.experts import is_mixture, prepare
from efficientllm.models.families import FAMILIES
from efficientllm.models.family import FIELDS, HEAD, Family, family_for
from efficientllm.models.parts import EMBEDDING_WEIGHT, HEAD_WEIGHT, LAYERS_PREFIX, NORM_WEIGHT
from efficientllm.pruning.dimensions import HIDDEN
from efficientllm.pruning.groups import ParamSpec, Space, labels
from efficientllm.pruning.widths import Widths

BY_LAYER = ("layer_types", "no_rope_layers")  # lists in a config with an entry for every layer


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _fields(config: PretrainedConfig) -> Mapping[str, str]:
    return FAMILIES[config.model_type].fields if config.model_type in FAMILIES else FIELDS


def rope_of(config: PretrainedConfig, layers: str = "full_attention") -> Mapping[str, Any]:
    """Settings of the rotary positions: rope_parameters, by type of layer where they differ, which transformers 4 calls
    rope_scaling (with rope_theta beside it)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found: Mapping[str, Any] = rope.get(layers, rope)
    return found


def rope_kind(config: PretrainedConfig, layers: str = "full_attention") -> str:
    """The kind of scaling of the rotary positions, "default" where there is none."""
    rope = rope_of(config, layers)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def widths_of(config: PretrainedConfig) -> Widths:
    return Widths(**{width: getattr(config, name) for width, name in _fields(config).items()})


def space_of(config: PretrainedConfig, use: str = "pruned") -> Space:
    """The pruning space of a model. Raises UsageError for a family or configuration that is not supported.

    use: what is to be done with the model, for the sentence.
    """
    family = family_for(config, use)
    _check_widths(config)
    widths, head_dim = widths_of(config), head_dim_of(config)
    vocabulary = config.vocab_size
    rows = {
        name: tuple(head_dim if axis == HEAD else axis for axis in axes)
        for name, axes in family.layer_axes(config).items()
    }
    params = [ParamSpec(EMBEDDING_WEIGHT, (vocabulary, HIDDEN))]
    for layer in range(widths.layers):
        params += [ParamSpec(f"{LAYERS_PREFIX}{layer}.{name}", axes, layer) for name, axes in rows.items()]
    params.append(ParamSpec(NORM_WEIGHT, (HIDDEN,)))
    if not config.tie_word_embeddings:
        params.append(ParamSpec(HEAD_WEIGHT, (vocabulary, HIDDEN)))
    return Space(
        tuple(params),
        widths,
        head_dim,
        embeddings=frozenset({EMBEDDING_WEIGHT}),
        scaling=_scaling(family, params, tied=config.tie_word_embeddings),
        offsets={spec.name: family.offset for spec in params if "norm" in spec.name and labels(spec.axes[0])},
        closing=frozenset(
            spec.name for spec in params if spec.name.endswith(tuple(f".{norm}.weight" for norm in family.closing))
        ),
        hidden_rule=family.hidden_rule(config.to_dict()),
        eager=family.eager,
        experts_per_token=config.num_experts_per_tok if is_mixture(config) else 1,
        fixed=family.fixed(),
    )


def _scaling(family: Family, params: Sequence[ParamSpec], *, tied: bool) -> dict[str, tuple[tuple[str, int], ...]]:
    """What keeps the function as it is when widths change, as Space.scaling has it.

    A norm over n entries, n' of which are left, divides by the root of the mean square of those, plus the epsilon of
    all norms, which grows by D/d with the stem's cut (narrowed_config). So gains grow by sqrt(n/n'), and the inputs of
    the norm by sqrt(D/d * n'/n): not at all in the stem, by sqrt(D/d) where a norm keeps its length (Qwen3's heads).
    An embedding whose output is multiplied by the root of the width grows by sqrt(D/d), and where it is the LM head
    too, the gain before that does not.
    """
    gains = {spec.name: labels(spec.axes[0]) for spec in params if "norm" in spec.name}
    scaling = {name: tuple((axis, 1) for axis in axes) for name, axes in gains.items()}
    for spec in params:
        for norm, modules in family.normed.items():
            if spec.name.rpartition(".")[0].endswith(tuple(f".{module}" for module in modules)):
                over = gains[f"{LAYERS_PREFIX}{spec.layer}.{norm}.weight"]
                scaling[spec.name] = ((HIDDEN, 1), *((axis, -1) for axis in over))
    if family.root_scaled:
        scaling[EMBEDDING_WEIGHT] = ((HIDDEN, 1),)
        scaling[NORM_WEIGHT] = () if tied else scaling[NORM_WEIGHT]
    return scaling


def _check_widths(config: PretrainedConfig) -> None:
    """Raises UsageError for a shape that no model has; transformers itself takes some of them."""
    for name in (*_fields(config).values(), "vocab_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"the model's config.json has {name} {value}, which is no positive number; copy it anew")
    if is_mixture(config) and not 0 < config.num_experts_per_tok <= config.num_experts:
        raise UsageError(
            f"the model's config.json has {config.num_experts_per_tok} experts a token (num_experts_per_tok), but "
            f"{config.num_experts} experts; copy it anew"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"the model's config.json has {config.num_attention_heads} heads, no multiple of its "
            f"{config.num_key_value_heads} key/value heads; copy it anew"
        )


def narrowed_config(
    config: PretrainedConfig, widths: Widths, by_layer: Mapping[str, list[Any]] | None = None
) -> PretrainedConfig:
    """The config of the same family (a Llama may become a Mistral) at other widths.

    by_layer: what its lists by layer are to be (`of_layers`); default: those of the first layers.

    Epsilon grows by D/d with the stem's cut, which together with the gains' sqrt(D/d) leaves the function as it is.
    """
    values = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "torch_dtype"):
        values.pop(key, None)
    family, record = family_for(config), widths.record()
    values |= {name: record[width] for width, name in family.fields.items()}
    values["head_dim"] = head_dim_of(config)
    values["rms_norm_eps"] = config.rms_norm_eps * config.hidden_size / widths.hidden
    return family.config(values | dict(of_layers(values, range(widths.layers)) if by_layer is None else by_layer))


def of_layers(values: Mapping[str, Any], kept: Sequence[int]) -> dict[str, list[Any]]:
    """Of a config as a dict the lists by layer, with the entries of these layers alone."""
    return {name: [values[name][layer] for layer in kept] for name in BY_LAYER if values.get(name)}


def attention_of(config: PretrainedConfig) -> str:
    """The implementation of attention that computes the model as it is, by transformers' name."""
    family = FAMILIES.get(config.model_type)
    return "eager" if family and family.eager else "sdpa"


def build(config: PretrainedConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A model with fresh fp32 weights, no key-value cache."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention_of(config))
    prepare(model)
    model.config.use_cache = False
    return model


class _Unallocated(TorchFunctionMode):
    """Sends torch.empty, which the weights of nn.Linear and nn.Embedding come from, to the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def empty_model(config: PretrainedConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """As `build`, but its matrices have no memory yet (meta tensors); buffers are real.

    Buffers (rotary frequencies) are computed on the CPU and then moved, as from_pretrained does: a GPU's power
    function may differ in the last bit.
    """
    with _Unallocated():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention_of(config))
    prepare(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    model.config.use_cache = False
    return model


def check_space(space: Space, model: nn.Module) -> None:
    """Raises UsageError unless the space names every weight of the model with its shape."""
    have = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    want = {spec.name: space.shape(spec, space.widths) for spec in space.params}
    if have != want:
        odd = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        raise UsageError(
            f"the model's weights are not those of its family: {odd[0]} is {have.get(odd[0], 'missing')}, "
            f"expected {want.get(odd[0], 'none')}; modified architectures are not supported"
        )
