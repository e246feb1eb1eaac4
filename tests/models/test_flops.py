"""Analytic FLOPs against torch.utils.flop_counter, operation by operation: passes, and whole runs that prune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from conftest import tiny_config, tiny_model
from efficientllm.config import Recipe
from efficientllm.models.experts import is_mixture
from efficientllm.models.flops import decode_flops, forward_flops, prefill_flops, training_flops
from efficientllm.models.parts import recompute
from efficientllm.models.space import build, space_of
from efficientllm.training import gradient
from efficientllm.training.distillation import Distillation, LiveTeacher
from efficientllm.training.gradient import Precision, summed_loss
from efficientllm.training.loop import train_steps
from efficientllm.training.planning import pruning_plan
from efficientllm.training.state import start

CPU = Precision("cpu", bf16=False)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextmanager
def counting(*, eager: bool = False) -> Iterator[FlopCounterMode]:
    """PyTorch's counter, with its own formulas also for the SDPA kernel of CPUs, which it does not know. eager: no
    kernel is there to be counted."""

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    mapping = {ATTENTION: forward, ATTENTION_BACKWARD: backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield counter
    names = {str(name) for name in counter.get_flop_counts()["Global"]}
    assert eager or any("attention" in name for name in names), "attention ran in a kernel that was not counted"


def counted_model(family: str) -> Any:
    """Experts one by one: PyTorch's counter does not know their grouped products."""
    model = tiny_model(family)
    if is_mixture(model.config):
        model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_a_pass_and_a_training_step(
    family: str, checkpointing: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunked loss counts as the plain one does; 51 tokens are six chunks of 8 and a ragged one."""
    monkeypatch.setattr(gradient, "chunk_tokens", lambda vocabulary: 8)
    model = counted_model(family)
    model.train()
    if checkpointing:
        recompute(model)
    rows = torch.randint(0, 61, (3, 17))
    space = space_of(model.config)
    passed = forward_flops(space, 3, 17)
    with counting(eager=space.eager) as counter, torch.no_grad():
        summed_loss(model, rows, CPU, chunked=chunked)
    assert passed.total == counter.get_total_flops()
    with counting(eager=space.eager) as counter, torch.no_grad():
        model.model(input_ids=rows, use_cache=False)
    assert passed.base == counter.get_total_flops()
    with counting(eager=space.eager) as counter:
        summed_loss(model, rows, CPU, chunked=chunked).backward()
    assert training_flops(passed, gradient_checkpointing=checkpointing) == counter.get_total_flops()


def test_generation(family: str) -> None:
    """Prefill with logits for the last position alone, then one token from the cache of those before it."""
    model, tokens = counted_model(family).eval(), torch.randint(0, 61, (3, 17))
    space = space_of(model.config)
    with counting(eager=space.eager) as counter, torch.no_grad():
        out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    assert prefill_flops(space, 3, 17) == counter.get_total_flops()
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    attended = sum(8 if kind == "sliding_attention" else 18 for kind in kinds)
    with counting(eager=space.eager) as counter, torch.no_grad():
        model(input_ids=tokens[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert 3 * decode_flops(space, attended) == counter.get_total_flops()


def test_narrower_widths_are_those_of_a_narrower_model(family: str) -> None:
    space = space_of(tiny_config(family))
    ffn, field = ("ffn", "intermediate_size") if "moe" not in family else ("expert_ffn", "moe_intermediate_size")
    field = "intermediate_size" if family.startswith("olmoe") else field
    narrow = getattr(tiny_config(family), field) - 7
    widths = space.widths.after(ffn, 7).after("stem", 3).after("depth")
    there = space_of(tiny_config(family, **{field: narrow}, num_hidden_layers=1, hidden_size=37 + 3))
    assert forward_flops(there, 2, 9, widths) == forward_flops(space, 2, 9, widths)
    assert forward_flops(space, 2, 9, widths).total < forward_flops(space, 2, 9).total


class RandomRows:
    def batch(self, step: int, part: slice = slice(None), /) -> torch.Tensor:
        return torch.randint(0, 61, (8, 32), generator=torch.Generator().manual_seed(step))[part]


@pytest.mark.parametrize(
    ("prune", "distilled"),
    [
        ({}, False),
        ({"types": ["ffn", "stem"]}, True),
        ({"curve": "linear"}, False),
        ({"saliency": "wanda", "correction": "none"}, False),
        ({"mode": "one-shot", "end": None, "bound": None}, False),
    ],
    ids=["loop", "distilled", "chunked", "inputs", "one-shot"],
)
def test_a_run_counts_all_that_it_computes(prune: dict[str, Any], distilled: bool) -> None:
    """Steps at every width, refreshes, captured inputs, corrections and the teacher: to the operation."""
    options = {"target": "50%", "end": "60%", "floors": {"intermediate": 8}, "bound": 0.05} | prune
    train = {"tokens": 8 * 256, "batch_tokens": 256, "micro_batch": 3, "lr": 1e-2, "gradient_checkpointing": distilled}
    train |= {"loss": "chunked"} if "curve" in prune else {}
    recipe = Recipe.model_validate(
        {
            "source": "here",
            "data": {"train": "none", "sequence_length": 32},
            "train": train,
            "prune": options,
            "run": {"dir": "none"},
        }
    )
    torch.manual_seed(0)
    model = build(tiny_config("llama-gqa"))
    plan = pruning_plan(recipe, model.config)
    state = start(model, recipe.train, plan)
    teacher = Distillation(LiveTeacher(tiny_model("llama-gqa").eval()), 0.5, 20) if distilled else None
    with counting() as counter:
        records = list(
            train_steps(
                state,
                RandomRows(),
                recipe.train,
                plan,
                steps=8,
                precision=CPU,
                distillation=teacher,
            )
        )
    assert sum(record.compaction is not None for record in records) >= 1
    reports = [record.prune for record in records if record.prune]
    assert any(report.refreshes for report in reports)
    assert (state.flops.correction > 0) == ("correction" not in prune)
    assert (state.flops.teacher > 0) == distilled
    assert state.flops.looks > 0
    assert state.flops.total == counter.get_total_flops()
