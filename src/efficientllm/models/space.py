"""From a transformers config to what pruning needs: the space, and the config of narrower widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from efficientllm.errors import UsageError
from efficientllm.models.adapter import adapter_for
from efficientllm.models.parts import EMBEDDING_WEIGHT, HEAD_WEIGHT
from efficientllm.pruning.dimensions import HIDDEN
from efficientllm.pruning.groups import ParamSpec, Space
from efficientllm.pruning.widths import Widths


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def widths_of(config: PretrainedConfig) -> Widths:
    return Widths(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    )


def space_of(config: PretrainedConfig, use: str = "pruned") -> Space:
    """The pruning space of a model. Raises UsageError for a family or configuration that is not supported.

    use: what is to be done with the model, for the sentence.
    """
    adapter = adapter_for(config, use)
    _check_widths(config)
    widths = widths_of(config)
    vocabulary = config.vocab_size
    params = [ParamSpec(EMBEDDING_WEIGHT, (vocabulary, HIDDEN))]
    for layer in range(widths.layers):
        for name, axes in adapter.layer_axes(config).items():
            params.append(ParamSpec(f"model.layers.{layer}.{name}", axes, layer))
    params.append(ParamSpec("model.norm.weight", (HIDDEN,)))
    if not config.tie_word_embeddings:
        params.append(ParamSpec(HEAD_WEIGHT, (vocabulary, HIDDEN)))
    gains = {spec.name for spec in params if spec.axes == (HIDDEN,) and "norm" in spec.name}
    feeding = {
        spec.name for spec in params if spec.layer is not None and spec.name.endswith(adapter.norm_inputs() or ("\0",))
    }
    return Space(
        tuple(params),
        widths,
        head_dim_of(config),
        embeddings=frozenset({EMBEDDING_WEIGHT}),
        stem_gains=frozenset(gains),
        norm_inputs=frozenset(feeding),
    )


def _check_widths(config: PretrainedConfig) -> None:
    """Raises UsageError for a shape that no model has; transformers itself takes some of them."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in (*names, "vocab_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"the model's config.json has {name} {value}, which is no positive number; copy it anew")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"the model's config.json has {config.num_attention_heads} heads, no multiple of its "
            f"{config.num_key_value_heads} key/value heads; copy it anew"
        )


def narrowed_config(config: PretrainedConfig, widths: Widths) -> PretrainedConfig:
    """The config of the same family (a Llama may become a Mistral) at other widths.

    Epsilon grows by D/d with the stem's cut, which together with the gains' sqrt(D/d) leaves the function as it is.
    """
    values = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "torch_dtype"):
        values.pop(key, None)
    values |= {
        "num_hidden_layers": widths.layers,
        "hidden_size": widths.hidden,
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.kv_heads,
        "intermediate_size": widths.intermediate,
        "head_dim": head_dim_of(config),
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / widths.hidden,
    }
    if values.get("layer_types"):  # all alike where layers may be dropped (see uneven_layers)
        values["layer_types"] = values["layer_types"][: widths.layers]
    return adapter_for(config).narrow(values, widths)


def uneven_layers(config: PretrainedConfig) -> bool:
    """Whether some layers attend otherwise than others, so that a layer cannot take another one's place."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def build(config: PretrainedConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A model with fresh fp32 weights, SDPA attention, no key-value cache."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
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
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
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
