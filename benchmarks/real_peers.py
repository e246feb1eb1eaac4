"""Prunes a model folder to a size by a peer's own code from PyPI, for benchmarks/real.py (the extra `peers`).

    python benchmarks/real_peers.py NAME SOURCE OUT --target 107612006

OUT becomes an ordinary transformers folder with uniform layers; the facts of the pruning are printed as JSON. Every
peer is called as its own documentation or example calls it, and only the ratio is sought: the smallest whose result
has at most `target` parameters and loads. Both score by weights alone, so no text is needed.

Tried with optipfair 0.4.2 and torch-pruning 1.6.1 on transformers 5.23.0 and torch 2.13.0 (CPU). Not among them:
nvidia-modelopt 0.47.0, none of whose three prunings gives a Llama of uniform layers on a CPU without Megatron.
* `mcore_minitron`: `mtp.prune(model, mode="mcore_minitron", ...)` ends with KeyError: 'mcore_minitron', because its
  plugin is not registered (ModuleNotFoundError: No module named 'megatron').
* `fastnas` runs on a toy Llama of transformers (with torchprofile 0.0.4; 0.1.0 has no `handlers`), though its
  documentation recommends it for vision. It sees the FFN alone, in multiples of 32, and searches a width for every
  layer by itself, with a score to be given by the user: in general not a shape that a config.json can state.
* `puzzletron` needs CUDA: its distributed.setup() ends with AttributeError: module 'torch._C' has no attribute
  '_cuda_setDevice', and it too searches a shape for every layer by itself.
Adapt-Pruner (arXiv 2502.03460) is not a package: its repository has no setup.py or pyproject.toml and asks to replace
files of transformers by its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from efficientllm.errors import UsageError
from efficientllm.models.loading import located

WIDTHS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)


def package(name: str) -> Any:
    """The peer's package; UsageError: it is not installed."""
    try:
        return import_module(name.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise UsageError(f'{name} cannot be imported ({error}): pip install "efficientllm[peers]"') from None


def prune_by_optipfair(model: Any, ratio: float) -> str:
    """optipfair.prune_model at its defaults: from every layer the FFN channels of least peak-to-peak weight go."""
    percentage = 100 * ratio
    package("optipfair").prune_model(model, pruning_percentage=percentage, show_progress=False)
    return f"optipfair.prune_model(model, pruning_percentage={percentage:.3f}): FFN by MAW, all else at defaults"


def prune_by_torch_pruning(model: Any, ratio: float) -> str:
    """Hidden size, query heads and FFN channels by magnitude, as Torch-Pruning's examples/LLMs/prune_llm.py.

    Its own code takes equally many query heads from every KV head's group, at least one at any ratio above 0 (and none
    where one in each would remain), and leaves KV heads and the heads' size. The example as it stands walks the graph
    for ever on transformers 5 (VainF/Torch-Pruning issue 527). Two options of transformers, set while it traces, end
    that: eager attention, for it knows grouped queries by the `expand` of their keys, and no KV cache, whose `cat` it
    takes for one of channels.
    """
    tp, config = package("torch-pruning"), model.config
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = {attention.q_proj: config.num_attention_heads for attention in attentions}
    heads |= {weight: config.num_key_value_heads for part in attentions for weight in (part.k_proj, part.v_proj)}
    model.set_attn_implementation("eager")
    cached, config.use_cache = config.use_cache, False
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.arange(4)[None],
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        output_transform=lambda output: output.logits,
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        out_channel_groups={},
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    config.use_cache = cached
    config.hidden_size = model.lm_head.in_features
    config.num_attention_heads = attentions[0].q_proj.out_features // attentions[0].head_dim
    config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    model.tie_weights()
    return (
        f"tp.pruner.BasePruner(model, pruning_ratio={ratio:.5f}, head_pruning_ratio={ratio:.5f}, "
        "importance=GroupMagnitudeImportance(p=2, group_reduction='mean'), global_pruning=False, prune_num_heads=True, "
        "prune_head_dims=False, round_to=4), as examples/LLMs/prune_llm.py; traced with eager attention, without cache"
    )


Prune = Callable[[Any, float], str]  # (model, ratio): prunes the model in place, widths in its config; the call made
PEERS: dict[str, Prune] = {"optipfair": prune_by_optipfair, "torch-pruning": prune_by_torch_pruning}


def parameters_of(module: torch.nn.Module) -> int:
    """Parameters; one that two modules share counts once."""
    return sum(weight.numel() for weight in module.parameters())


def trial(prune: Prune, config: Any, ratio: float) -> tuple[int, bool]:
    """(parameters of a model of `config` pruned at a ratio, whether its folder would load).

    A peer's widths follow from the ratio alone and are those of every layer, so one layer of random weights tells them.
    """
    short = deepcopy(config)
    short.num_hidden_layers = 1
    model: Any = AutoModelForCausalLM.from_config(short)
    prune(model, ratio)
    repeated = (config.num_hidden_layers - 1) * parameters_of(model.model.layers)
    return parameters_of(model) + repeated, is_valid(model.config)


def is_valid(config: Any) -> bool:
    """Whether transformers accepts the config; a Llama's hidden size must be a multiple of its heads, say."""
    try:
        type(config)(**config.to_dict())
    except (ValueError, StrictDataclassError):
        return False
    return True


def smallest(steps: int, fits: Callable[[int], bool], loads: Callable[[int], bool]) -> int | None:
    """The first of 1 .. steps - 1 that fits and loads, by bisection over what fits; None: there is none.

    Where sizes do not fall all the way (a peer keeps more heads at some larger ratio), it follows upon one that does
    not fit all the same.
    """
    low, high = 1, steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return next((step for step in range(low, steps) if fits(step) and loads(step)), None)


def prune_by_peer(name: str, source: Path, target: int, out: Path) -> dict[str, Any]:
    """Writes `source` (a Llama-like folder or GGUF file), pruned by the peer to at most `target` parameters, to `out`.

    Returns how that was done.

    The ratios tried are those between one FFN channel and the next. seconds: of all of it, the search too.
    UsageError: the peer is not installed, or no ratio leads to the target.
    """
    began, prune = time.perf_counter(), PEERS[name]
    package(name)
    folder = located(str(source), "source")
    config = AutoConfig.from_pretrained(folder)
    steps = config.intermediate_size
    tried = cache(lambda step: trial(prune, config, (step + 0.5) / steps))
    step = smallest(steps, lambda step: tried(step)[0] <= target, lambda step: tried(step)[1])
    if step is None:
        raise UsageError(f"{name} cannot prune {source} to {target} parameters or fewer: give a larger target")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    how = prune(model, (step + 0.5) / steps)
    parameters = parameters_of(model)
    assert parameters == tried(step)[0], "the peer's widths depend on the weights, so that one layer cannot tell them"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return {
        "name": name,
        "version": version(name),
        "parameters": parameters,
        "widths": {width: getattr(model.config, width) for width in WIDTHS},
        "seconds": round(time.perf_counter() - began, 1),
        "how": how,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(PEERS))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=int, required=True, help="parameters of the result, at most")
    arguments = parser.parse_args()
    try:
        facts = prune_by_peer(arguments.name, arguments.source, arguments.target, arguments.out)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
