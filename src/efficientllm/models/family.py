"""What pruning must be told about a family of models, as data: one row a family (families.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from efficientllm.errors import UsageError
from efficientllm.pruning.dimensions import ATTENTION as HEADS
from efficientllm.pruning.dimensions import ATTENTION_QUERY, EXPERT, EXPERT_FFN, FFN, HIDDEN, KV, QUERY, STEM
from efficientllm.pruning.groups import MULTIPLE, Axis

HEAD = "head"  # the axis of a weight that all heads of a layer share: head_dim entries, of which none falls
Axes = dict[str, tuple[Axis, ...]]
Refusal = tuple[str, str]  # a fact, as a clause of its own, and how a sentence about pruning goes on after it

ATTENTION: Axes = {
    "self_attn.q_proj.weight": (QUERY, HIDDEN),
    "self_attn.k_proj.weight": (KV, HIDDEN),
    "self_attn.v_proj.weight": (KV, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, QUERY),
}
QKV_BIASES: Axes = {
    "self_attn.q_proj.bias": (QUERY,),
    "self_attn.k_proj.bias": (KV,),
    "self_attn.v_proj.bias": (KV,),
}
O_BIAS: Axes = {"self_attn.o_proj.bias": (HIDDEN,)}
FFN_BIASES: Axes = {"mlp.gate_proj.bias": (FFN,), "mlp.up_proj.bias": (FFN,), "mlp.down_proj.bias": (HIDDEN,)}
HEAD_NORMS: Axes = {"self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,)}
GATED: Axes = {
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, FFN),
}
# As transformers 5 fuses them: a matrix of each expert, gate over up.
MIXTURE: Axes = {
    "mlp.gate.weight": (EXPERT, HIDDEN),
    "mlp.experts.gate_up_proj": (EXPERT, (EXPERT_FFN, EXPERT_FFN), HIDDEN),
    "mlp.experts.down_proj": (EXPERT, HIDDEN, EXPERT_FFN),
}
LAYER: Axes = {
    "input_layernorm.weight": (HIDDEN,),
    **ATTENTION,
    "post_attention_layernorm.weight": (HIDDEN,),
    **GATED,
}
MIXTURE_LAYER: Axes = {name: axes for name, axes in LAYER.items() if name not in GATED} | MIXTURE
FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
}
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True)
class Carrier:
    """Another family with the same weights and function, whose config class takes more shapes.

    without: fields of the config that it does not know. values: fields that it needs to compute the same.
    """

    model_type: str
    without: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One family of RMSNorm decoders. What a family multiplies by constants of its config (Granite) needs no word here.

    model_type: transformers' name. layer: every weight of a layer by its name after `model.layers.N.`, with the axis of
    each dimension (pruning/groups.py, or HEAD); a weight with "norm" in its name is the gain of an RMSNorm over its
    axis. optional: further weights of a layer, by the field of the config that says whether they are there.
    normed: norms over another axis than the stem's, and the linear layers whose output they normalise. Weights outside
    the layers are the same in all families (parts.py). offset: what norms add to their weights to get their gains.
    root_scaled: the embedding's output is multiplied by the root of the hidden width. closing: norms at the end of the
    sublayers, whose outputs are what a layer adds to the stem; none: its linear layers add theirs.
    eager: attention has no kernel of its own in transformers (its scores are capped).
    fields: the field of the config that holds each width of a record (pruning/widths.py).
    carrier: who carries the shapes that the family's own config class refuses, a hidden size that is no multiple of
    the heads; None: the class takes any. whole: it refuses such shapes, and nobody carries them.
    long_rotary: it refuses shapes in which hidden // heads is not head_dim, where rotary factors are given by channel.
    square: its modules take the hidden size for heads x head_dim too, for norms over all heads: neither falls alone.
    refused: fields of the config that must not be set, and what to say where they are.
    gguf: llama.cpp's name of the architecture, a row of export/gguf_tensors.py; None: it has none.
    """

    model_type: str
    layer: Axes = field(default_factory=lambda: LAYER)
    optional: Mapping[str, Axes] = field(default_factory=dict)
    normed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    offset: float = 0.0
    root_scaled: bool = False
    closing: tuple[str, ...] = ()
    eager: bool = False
    fields: Mapping[str, str] = field(default_factory=lambda: FIELDS)
    carrier: Carrier | None = None
    whole: bool = False
    long_rotary: bool = False
    square: bool = False
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    gguf: str | None = None

    def layer_axes(self, config: PretrainedConfig) -> Axes:
        """Names and axes of one layer's weights in a model of this config."""
        axes = dict(self.layer)
        for flag, more in self.optional.items():
            if getattr(config, flag, None):
                axes |= more
        return axes

    def refusal(self, config: PretrainedConfig) -> Refusal | None:
        """What this particular configuration has that cannot be pruned, and why or what to do; None where it can."""
        for flag, reason in self.refused.items():
            if getattr(config, flag, None):
                return reason
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            return "some of its layers are dense and others mixtures of experts", "; all layers must be alike"
        if getattr(config, "quantization_config", None):
            return "its weights are quantised", "; use the unquantised checkpoint"
        for name in DROPOUTS:
            if getattr(config, name, 0.0):
                return f"{name} is not 0 in its config.json", "; set it to 0.0, since a run must be repeatable"
        return None

    def fixed(self) -> dict[str, str]:
        """Pruning types that cannot fall, and why, as the end of a sentence (groups.Space)."""
        why = f"its q and k norms run over all heads, and {self.model_type} gives them the hidden size's length"
        return dict.fromkeys((HEADS, ATTENTION_QUERY, STEM), why) if self.square else {}

    def config(self, values: Mapping[str, Any]) -> PretrainedConfig:
        """A config of these values, of the family or, where its class refuses their shape, of its carrier.

        One that nobody takes can still be built and measured, but not saved for others: see pruning/shapes.py, fits.
        """
        model_type, values = self.model_type, dict(values)
        hidden, heads = values[self.fields["hidden"]], values[self.fields["heads"]]
        if self.carrier and hidden % heads:
            model_type = self.carrier.model_type
            values = {key: value for key, value in values.items() if key not in self.carrier.without}
            values |= self.carrier.values
        if self.hidden_rule(values) is not None:
            values[self.fields["hidden"]] = heads * values["head_dim"]
        config: PretrainedConfig = CONFIG_MAPPING[model_type](**values)
        setattr(config, self.fields["hidden"], hidden)
        return config

    def hidden_rule(self, values: Mapping[str, Any]) -> str | int | None:
        """What the config class asks of the hidden width (Space.hidden_rule) in a config of these values."""
        rotary = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if self.long_rotary and any(rotary.get(name) for name in ("short_factor", "long_factor")):
            return int(values.get("head_dim") or values[self.fields["hidden"]] // values[self.fields["heads"]])
        return MULTIPLE if self.whole else None


def family_for(config: PretrainedConfig, use: str = "pruned") -> Family:
    """The family of a model. Raises UsageError listing the supported ones, or saying what is in the way.

    use: what is to be done with the model, for the sentence.
    """
    from efficientllm.models.families import FAMILIES

    model_type = getattr(config, "model_type", "unknown")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UsageError(f"models of type '{model_type}' are not supported; choose a source of one of: {known}")
    family = FAMILIES[model_type]
    reason = family.refusal(config)
    if reason:
        fact, rest = reason
        if use != "pruned":
            rest = "; only models that could be pruned are supported here"
        raise UsageError(f"this {model_type} model cannot be {use}: {fact}{rest}")
    return family
