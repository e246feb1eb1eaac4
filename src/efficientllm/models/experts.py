"""Mixtures of experts as transformers 5 stores them: a router, and one fused weight of all experts.

A dead expert's row of the router is zero, which gives it a logit of zero and not of minus infinity: it would be chosen
still, and take probability from the others. So while a model is trained, the logit of an expert whose row is exactly
zero is set to minus infinity: it is never chosen, nothing of it has a gradient, and cutting it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from efficientllm.errors import UsageError
from efficientllm.models.parts import blocks
from efficientllm.pruning.gates import Routed

ROUTER, UP, DOWN = "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERT_STEP = 8  # that widths which experts read are multiples of: torch's grouped products want rows of 16 bytes


def is_mixture(config: Any) -> bool:
    """Whether the model has a mixture of experts that is known here."""
    from efficientllm.models.families import FAMILIES

    family = FAMILIES.get(config.model_type)
    return family is not None and ROUTER in family.layer


def prepare(model: Any) -> None:
    """Hides dead experts from the router, and chooses the products by which experts are computed; nothing for a dense
    model. May be called again."""
    if not is_mixture(model.config):
        return
    first = blocks(model)[0].mlp
    _check_names(first)
    fits = not any(width % EXPERT_STEP for width in first.experts.down_proj.shape[1:])
    model.set_experts_implementation("grouped_mm" if fits else "batched_mm")
    for block in blocks(model):
        router: Any = block.mlp.gate
        if _hide_dead not in router._forward_hooks.values():
            # Before the hooks that transformers keeps router logits by, so that those see what this one returns.
            router.register_forward_hook(_hide_dead, prepend=True)


def _check_names(block: Any) -> None:
    """Raises UsageError where this transformers has changed what is written once more here, or looked in at."""
    known = {block.gate: ("weight", "top_k", "norm_topk_prob"), block.experts: ("config", "_apply_gate")}
    for module, names in known.items():
        for name in names:
            if not hasattr(module, name):
                raise UsageError(
                    f"transformers {transformers.__version__} has no {type(module).__name__}.{name}, which pruning a "
                    "mixture of experts goes by; install an earlier one"
                )


def _hide_dead(router: Any, _args: object, output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the router returns (logits, weights, experts), each (tokens, ...), with dead experts out of the choice.

    The module's own function, written once more: it has no place between the logits and the choice. A layer whose
    experts are all dead is one that has fallen as a whole, and gives nothing whatever is chosen.
    """
    logits = output[0]
    dead = (router.weight == 0).all(1)
    logits = logits.masked_fill(dead & ~dead.all(), -torch.inf)
    shares = functional.softmax(logits, dtype=torch.promote_types(logits.dtype, torch.float), dim=-1)
    weights, experts = torch.topk(shares, router.top_k, dim=-1)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights.to(logits.dtype), experts


def as_saved(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """How a weight lies in a model folder, by name: those of experts one by one, gate and up apart."""
    base, _, part = name.rpartition(".experts.")
    if part == "down_proj":
        return {f"{base}.experts.{expert}.down_proj.weight": shape[1:] for expert in range(shape[0])}
    if part == "gate_up_proj":
        half = (shape[1] // 2, shape[2])
        return {
            f"{base}.experts.{expert}.{each}.weight": half
            for expert in range(shape[0])
            for each in ("gate_proj", "up_proj")
        }
    return {name: shape}


def reader_module(model: Any, weight: str) -> Any:
    """The module whose first argument, (rows, length, inputs), is what a weight is multiplied with."""
    for part in (ROUTER, UP):
        if weight.endswith(part):
            return model.get_submodule(weight.removesuffix(part) + "mlp")
    return model.get_submodule(weight.removesuffix(".weight"))


@contextmanager
def seen_inputs(experts: Any, see: Callable[[Tensor, Tensor, Routed], None]) -> Iterator[None]:
    """While it lasts, `see` is given what every expert's last matrix is multiplied with, (rows, channels), a row for
    each token of each expert; the weights (rows, 1) that the router has given them; and which rows are whose."""
    routing: list[tuple[Tensor, Routed]] = []

    def routed(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        _, chosen, weights = args
        ids, per_token = chosen.flatten(), chosen.shape[-1]
        order = torch.arange(len(ids), device=ids.device)
        if module.config._experts_implementation == "grouped_mm":  # sorts its rows by expert, by this very call
            ids, order = torch.sort(ids)
        routing[:] = [(weights.flatten()[order, None], Routed(ids, order // per_token, len(chosen)))]

    before, others = experts._apply_gate, "_apply_gate" in vars(experts)

    def activated(gate_up: Tensor) -> Tensor:
        inputs: Tensor = before(gate_up)
        see(inputs, *routing.pop())
        return inputs

    handle = experts.register_forward_pre_hook(routed)
    experts._apply_gate = activated
    try:
        yield
    finally:
        handle.remove()
        del experts._apply_gate
        if others:  # who look on as well, and began before
            experts._apply_gate = before


def balance_of(config: Any) -> float:
    """The weight of the load-balancing loss in training, 0 where the model's config does not ask for one."""
    if not (getattr(config, "output_router_logits", False) and is_mixture(config)):
        return 0.0
    return float(config.router_aux_loss_coef)


def with_balance(
    loss: Callable[[Tensor], Tensor], model: Any, predicted: Callable[[Tensor], int], rows: Tensor
) -> Tensor:
    """A summed loss of rows, and for each of the tokens that are predicted there the load-balancing loss times its
    weight in the model's config."""
    logits: list[Tensor] = []
    routers = [block.mlp.gate for block in blocks(model)]
    hooks = [router.register_forward_hook(lambda module, args, out: logits.append(out[0])) for router in routers]
    try:
        total = loss(rows)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(logits) == len(routers), "the routers were not seen"
    weight = balance_of(model.config) * predicted(rows)
    return total + weight * balance_loss(logits, model.config.num_experts_per_tok)


def balance_loss(logits: Sequence[Tensor], per_token: int) -> Tensor:
    """The load-balancing loss of some rows: experts times the sum over them of the share of tokens that choose one and
    its mean probability, over all layers at once (Switch Transformer, arXiv 2101.03961, eqs. 4 to 6; transformers'
    load_balancing_loss_func). Scalar, fp32. Dead experts, whose logits are minus infinity, are not counted.

    logits: of each layer's router, (tokens, experts).
    """
    counts: Any = 0.0
    shares: Any = 0.0
    for layer in logits:
        probabilities = functional.softmax(layer.float(), dim=-1)
        chosen = torch.topk(probabilities, per_token, dim=-1).indices
        counts = counts + functional.one_hot(chosen, layer.shape[-1]).sum((0, 1))
        shares = shares + probabilities.sum(0)
    rows = sum(len(layer) for layer in logits)
    live = logits[0].detach()[0].isfinite().sum()
    loss: Tensor = live * (counts / rows * (shares / rows)).sum()
    return loss
