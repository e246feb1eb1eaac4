"""The two calls in a loop: fixed points, the bound, final shapes, resumed state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from conftest import tiny_model
from efficientllm.models.space import space_of
from efficientllm.pruning.contract import PruneReport
from efficientllm.pruning.correction import SolverOptions
from efficientllm.pruning.criteria import criteria_of, hessian_flops, inverse_hessian_diagonal
from efficientllm.pruning.decision import ByDamage, Standing
from efficientllm.pruning.dimensions import ATTENTION_QUERY, DEFAULT_TYPES, of_type
from efficientllm.pruning.engine import OtherRule, PrunerOptions, PruningEngine
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.gates import GateSums
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.readers import reader_specs
from efficientllm.pruning.schedule import SpanSchedule
from efficientllm.pruning.shapes import Alignment, Floors
from efficientllm.pruning.shards import fill, local_place
from efficientllm.pruning.slices import group_slices
from efficientllm.training.capture import Inputs, captured_inputs, watched_gates


class Loop:
    """A bare training loop around a tiny model; also the pruner's probe. Corrected by default."""

    def __init__(self, family: str, *, share: float = 0.4, span: float = 10.0, **options: object) -> None:
        shape = {"num_hidden_layers": options.pop("num_hidden_layers", 2)} | options.pop("config", {})
        self.model = tiny_model(family, **shape)
        self.params = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.space = space_of(self.model.config)
        target = int(self.space.num_params() * share)
        types = tuple(options.pop("types", [each for each in self.space.types if of_type(each).default]))
        options = {"correction": SolverOptions(), "saliency": "taylor-element"} | options
        floors = Floors(**({"hidden": 8, "intermediate": 8} | options.pop("floors", {})))  # type: ignore[operator]
        feasible = FeasibleShapes(self.space, target, types=types, align=Alignment(4, 4), floors=floors)
        self.pruner = PruningEngine(
            self.space,
            self.params,
            self.moments,
            milestones=[feasible],
            schedule=SpanSchedule(0.0, span, self.space.num_params(), target, "linear"),
            options=PrunerOptions(types, **options),  # type: ignore[arg-type]
        )
        self.generator = torch.Generator().manual_seed(7)
        self.refreshes = 0

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        state = self.optimizer.state.get(self.params[name], {})
        return {key: value for key, value in state.items() if value.ndim}

    def loss(self) -> float:
        return float(self.model(input_ids=self.ids, labels=self.ids).loss.detach())

    def gates(self) -> None:
        return None

    def gradient(self, names: Sequence[str], gates: GateSums | None = None) -> Inputs:
        self.optimizer.zero_grad()
        watching = (
            watched_gates(self.model, self.pruner.space, gates) if gates else nullcontext(lambda row: nullcontext())
        )
        with captured_inputs(self.model, names) as inputs, watching as watch:
            with watch(0):
                loss = self.model(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
        self.refreshes += 1
        return inputs

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Inputs:
        with captured_inputs(self.model, names) as inputs:
            self.model(input_ids=self.ids)
        return inputs

    def vocabulary(self, guide: ByDamage, at: Standing) -> None:
        return None

    def train_step(self, position: float, observe: bool = True) -> object:
        self.ids = torch.randint(0, 61, (4, 12), generator=self.generator)
        self.optimizer.zero_grad()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        if observe:
            self.pruner.observe()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return self.pruner.step(position, self)


def test_zeroed_groups_stay_exactly_zero(family: str) -> None:
    """Weights and Adam moments, over 20 AdamW steps with weight decay and clipping."""
    space = space_of(tiny_model(family).config)
    for pruning_type in space.types:
        if space.widths.count(pruning_type) > space.least(pruning_type):
            stays_zero(family, pruning_type)


def stays_zero(family: str, pruning_type: str) -> None:
    loop = Loop(family, share=0.97, span=1.0, types=(pruning_type,))
    report = loop.train_step(1.0)
    events = [applied.event for applied in report.events]
    assert loop.pruner.finished
    assert events
    for step in range(20):
        loop.train_step(2.0 + step)
    for part in group_slices(loop.space, events):
        for tensor in (loop.params[part.name], *loop.moments(part.name).values()):
            place = local_place(tensor, part.dim, part.indices, part.rows)
            assert not tensor.detach()[place].any(), part.name


def test_dead_query_heads_need_the_care_of_observe() -> None:
    """Without it o_proj's columns come back to life: a zero query attends evenly and so reads the live values."""
    loop = Loop("llama-gqa", share=0.97, span=1.0, types=(ATTENTION_QUERY,))
    events = [applied.event for applied in loop.train_step(1.0).events]
    loop.train_step(2.0, observe=False)
    revived = [
        part.name
        for part in group_slices(loop.space, events)
        if loop.params[part.name].detach().index_select(part.dim, part.indices).any()
    ]
    assert revived
    assert all(name.endswith("o_proj.weight") for name in revived)


def test_lands_on_target_with_uniform_layers(family: str) -> None:
    loop = Loop(family, share=0.7 if family.startswith("olmoe") else 0.4)  # of which experts alone fall
    for step in range(1, 11):
        loop.train_step(float(step))
    pruner = loop.pruner
    assert pruner.finished
    assert pruner.feasible.reached(pruner.widths)
    assert pruner.parameters <= pruner.feasible.target
    live = pruner.live
    ffn = live["expert_ffn"].sum(2)[live["expert"]] if "experts" in pruner.widths.counts() else live["ffn"].sum(1)
    assert len(set(ffn.tolist())) == 1
    assert len(set(live["kv"].sum(1).tolist())) == 1
    queries = live["query"].sum(2)[live["kv"]]
    assert len(set(queries.tolist())) == 1
    zeros = sum(int((weight == 0).sum()) for weight in loop.params.values())
    assert zeros == loop.space.num_params() - pruner.parameters


def test_a_dead_layer_is_the_identity_and_stays_dead(family: str) -> None:
    """The floors leave no way to the target but by a layer."""
    floors = {"hidden": 40, "intermediate": 26, "expert_intermediate": 12}
    ffn = "expert_ffn" if "moe" in family else "ffn"
    types = ("depth", ffn) if "olmoe" in family else ("depth", ffn, "stem")
    loop = Loop(family, share=0.6, span=3.0, types=types, num_hidden_layers=3, floors=floors)
    for step in range(1, 12):
        loop.train_step(float(step))
    live = loop.pruner.live
    assert loop.pruner.finished
    assert 1 <= int(live["layers"].sum()) < 3
    dead = int((~live["layers"]).int().argmax())
    assert not live[ffn][dead].any()
    assert not live["kv"][dead].any()
    weights = [weight for name, weight in loop.params.items() if f"layers.{dead}." in name]
    assert not any(bool(weight.any()) for weight in weights)
    seen: list[torch.Tensor] = []

    def watch(_module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.extend((args[0], out))

    loop.model.model.layers[dead].register_forward_hook(watch)
    loop.loss()
    assert torch.equal(*seen)


def test_a_dead_layer_s_output_bias_stays_dead() -> None:
    """Qwen3 with attention_bias has a bias on o_proj, which a gradient reaches although the layer is zero."""
    loop = Loop("qwen3-gqa", share=0.7, span=1.0, types=("depth",), config={"attention_bias": True})
    for step in range(1, 9):
        loop.train_step(float(step))
    dead = int((~loop.pruner.live["layers"]).int().argmax())
    assert not loop.pruner.live["layers"][dead]
    assert not loop.params[f"model.layers.{dead}.self_attn.o_proj.bias"].any()


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


def test_an_event_without_correction_changes_nothing_but_its_groups(family: str) -> None:
    loop = Loop(family, share=0.9, span=1000.0, correction=None)
    loop.ids = torch.arange(48).reshape(4, 12)
    loop.gradient([])
    loop.pruner.observe()
    before = {name: weight.detach().clone() for name, weight in loop.params.items()}
    report = loop.pruner.step(0.0, loop)
    assert report.events == []
    report = loop.pruner.step(1.0, loop)
    assert report.events
    for part in group_slices(loop.space, [applied.event for applied in report.events]):
        fill(before[part.name], part.dim, part.indices, part.rows)
    for name, weight in loop.params.items():
        assert torch.equal(weight.detach(), before[name]), name


MIXED = {"stem": "gate-fisher", "ffn": "flap", "attention": "wanda", "attention_query": "taylor-element"}


def test_every_type_is_looked_at_by_its_own_criterion() -> None:
    mixed = Loop("llama-gqa", saliency=MIXED)
    mixed.ids = torch.arange(48).reshape(4, 12)
    mixed.pruner.looks.before_bundle(mixed, [], 1, PruneReport())
    found = mixed.pruner.looks.average.values()
    for pruning_type, name in MIXED.items():
        alone = Loop("llama-gqa", saliency=name)
        alone.ids = mixed.ids
        alone.pruner.looks.before_bundle(alone, [], 1, PruneReport())
        torch.testing.assert_close(found[pruning_type], alone.pruner.looks.average.values()[pruning_type])


def test_an_unknown_type_or_criterion_in_the_mapping_is_named() -> None:
    with pytest.raises(ValueError, match="'fnn' is no pruning type here"):
        criteria_of({"fnn": "flap"}, DEFAULT_TYPES)
    with pytest.raises(ValueError, match="'flapp'; did you mean 'flap'"):
        criteria_of({"ffn": "flapp"}, DEFAULT_TYPES)


@pytest.mark.parametrize("saliency", ["taylor-element", "gate-fisher", MIXED])
def test_state_resumes_bit_for_bit(saliency: str | dict[str, str]) -> None:
    one, two = Loop("qwen2-gqa-tied", saliency=saliency), Loop("qwen2-gqa-tied", saliency=saliency)
    for step in range(1, 5):
        one.train_step(float(step))
        two.train_step(float(step))
    tensors, facts = one.pruner.state()
    old = two.pruner
    two.pruner = PruningEngine(
        two.space,
        two.params,
        two.moments,
        milestones=old.course.milestones,
        schedule=old.course.schedule,
        options=old.options,
    )
    two.pruner.load_state(tensors, facts)
    for step in range(5, 11):
        one.train_step(float(step))
        two.train_step(float(step))
    for name, weight in one.params.items():
        assert torch.equal(weight, two.params[name])
    assert one.pruner.finished
    assert one.pruner.widths == two.pruner.widths


@pytest.mark.parametrize(("measured", "finished"), [({}, False), ({"ffn": 0.1}, False), ({"ffn": 0.1}, True)])
def test_a_run_that_compared_types_by_measured_losses_goes_on_only_once_it_is_over(
    measured: dict[str, float], finished: bool
) -> None:
    """The state of an earlier version, of which another rule would choose what is still to fall."""
    loop, fresh = Loop("llama-gqa", correction=None), Loop("llama-gqa", correction=None).pruner
    for step in range(1, 11 if finished else 5):
        loop.train_step(float(step))
    tensors, facts = loop.pruner.state()
    facts["calibration"] = {"smoothing": 0.5, "units": {}, "measured": measured, "predicted": measured}
    assert loop.pruner.finished == finished
    refused = bool(measured) and not finished
    with pytest.raises(OtherRule, match="compared by measured losses") if refused else nullcontext():
        fresh.load_state(tensors, facts)
    assert fresh.at == (Standing(fresh.space.widths, 0, 0) if refused else loop.pruner.at)
    assert (
        all(map(torch.all, fresh.live.values())) == (not fresh.looks.complete) == refused
    )  # refused, nothing has been taken over


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
