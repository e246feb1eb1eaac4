"""When the engine looks, at what, and what it makes of looks that are no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.criteria import hessian_flops, inverse_hessian_diagonal
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.readers import reader_specs
from efficientllm.training.hooks import Inputs
from pruning.engine_loop import MIXED, Loop


def test_the_bound_asks_for_fresh_gradients() -> None:
    """All pruning due at once: at most one bundle of 5 % (or one event) between two looks at the gradient. The step's
    own gradient is the first of them."""
    loop = Loop("llama-gqa", span=1.0, bound=0.05)
    report = loop.train_step(1.0)
    assert loop.pruner.finished
    assert report.refreshes == loop.refreshes >= 10


def test_an_event_above_the_bound_falls_alone_after_a_look_of_its_own() -> None:
    """A head is 8 % of the model, an FFN channel 1 %; the bound is 3 %, and FFN alone does not lead to the target."""
    floors = {"intermediate": 40}
    loop = Loop("llama-mha-tied", share=0.75, span=1.0, bound=0.03, types=("attention", "ffn"), floors=floors)
    bundles: list[tuple[int, set[str]]] = []
    looks: list[int] = []
    zero = loop.pruner.zero

    def counted(events: Sequence[Removal]) -> None:
        zero(events)
        looks.append(loop.refreshes)
        bundles.append((len(events), {event.type for event in events}))

    loop.pruner.zero = counted  # type: ignore[method-assign]
    report = loop.train_step(1.0)
    large = [applied for applied in report.events if applied.removed > 0.03 * (applied.parameters + applied.removed)]
    assert large
    assert {applied.event.type for applied in large} == {"attention"}
    assert looks == list(range(len(looks)))
    assert sum(number == 1 and types == {"attention"} for number, types in bundles) == len(large)
    assert all(types == {"ffn"} for number, types in bundles if number > 1)


def test_every_type_is_looked_at_by_its_own_criterion() -> None:
    mixed = Loop("llama-gqa", saliency=MIXED)
    mixed.ids = torch.arange(48).reshape(4, 12)
    mixed.pruner.looks.before_bundle(mixed, [], 0, PruneReport())
    found = mixed.pruner.looks.average.values()
    for pruning_type, name in MIXED.items():
        alone = Loop("llama-gqa", saliency=name)
        alone.ids = mixed.ids
        alone.pruner.looks.before_bundle(alone, [], 0, PruneReport())
        torch.testing.assert_close(found[pruning_type], alone.pruner.looks.average.values()[pruning_type])


def test_the_bill_of_a_look_counts_what_each_expert_reads() -> None:
    """What layers read together counts once, what an expert's last matrix reads by itself."""
    loop = Loop("qwen3-moe-gqa", saliency="sparsegpt", correction=None)
    loop.ids = torch.randint(0, 61, (4, 12), generator=loop.generator)
    widths, size = loop.space.widths, loop.model.config
    queries = widths.heads * size.head_dim
    layer = [widths.hidden, widths.hidden, queries] + [size.moe_intermediate_size] * size.num_experts
    expected = sum(hessian_flops(48, width) for width in layer * widths.layers + [widths.hidden])
    readers = [spec.name for spec in reader_specs(loop.space)]
    assert loop.pruner.looks._statistic_flops(loop.inputs(readers)) == expected


def test_both_attention_types_in_one_bundle_read_their_layer_once() -> None:
    loop = Loop("llama-gqa", share=0.85, span=1.0, types=("attention", "attention_query"), bound=1.0)
    asked: list[list[str]] = []
    inputs = loop.inputs

    def counted(names: Sequence[str]) -> Inputs:
        asked.append(list(names))
        return inputs(names)

    loop.inputs = counted  # type: ignore[method-assign]
    report = loop.train_step(1.0)
    assert {applied.event.type for applied in report.events} == {"attention", "attention_query"}
    assert all(len(names) == len(set(names)) for names in asked)


def test_a_gradient_that_is_no_number_is_left_out_and_counted() -> None:
    """A refresh that overflows must not stay in the average for good."""
    loop = Loop("llama-gqa", share=0.9, span=1.0, bound=0.02)
    gradient = loop.gradient

    def overflowing(names: Sequence[str], gates: GateSums | None = None) -> Inputs:
        inputs = gradient(names, gates)
        if loop.refreshes == 1:
            next(iter(loop.params.values())).grad.fill_(float("nan"))
        return inputs

    loop.gradient = overflowing  # type: ignore[method-assign]
    report = loop.train_step(1.0)
    assert loop.pruner.finished
    assert report.refreshes > 1
    assert report.nonfinite == 1
    assert all(bool(total.isfinite().all()) for total in loop.pruner.looks.average.sums.values())
    assert loop.train_step(2.0).nonfinite == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_end_in_no_loop_and_no_event(value: float) -> None:
    assert inverse_hessian_diagonal(torch.full((4, 3), value)).isnan().all()
    loop = Loop("llama-gqa", span=1.0, saliency="sparsegpt", correction=None)
    inputs = loop.inputs

    def broken(names: Sequence[str]) -> Inputs:
        captured = inputs(names)
        captured[names[0]].fill_(value)
        return captured

    loop.inputs = broken  # type: ignore[method-assign]
    report = loop.train_step(1.0)
    assert report.events == []
    assert (report.nonfinite, report.blind) == (1, True)
    loop.inputs = inputs  # type: ignore[method-assign]
    after = loop.train_step(2.0)
    assert after.events
    assert not after.blind
