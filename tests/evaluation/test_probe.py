"""What `probe` measures is true, leaves no trace, and comes out as a table, a file and a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import World, tiny_model
from efficientllm.cli import main
from efficientllm.evaluation.probe import criteria_scores, judge, rank_correlation
from efficientllm.evaluation.removal import Sample, loss_increases, passes, removed, sample_units
from efficientllm.jobs import probing as job
from efficientllm.models.space import space_of
from efficientllm.pruning.criteria import CRITERIA
from efficientllm.pruning.dimensions import PRUNING_TYPES
from efficientllm.training.gradient import Precision, row_losses
from reference.groups_fp64 import group_masks

FOR_DENSE = CRITERIA.keys() - {"reap"}
CPU = Precision("cpu", bf16=False)
IDS = torch.randint(0, 61, (6, 20), generator=torch.Generator().manual_seed(3))


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [5, 4, 3, -2]) == pytest.approx(-1.0)
    # With a tie: ranks 1.5, 1.5, 3 against 1, 3, 2; Pearson's of those by hand is 0.
    assert rank_correlation([7, 7, 9], [1, 3, 2]) == pytest.approx(0.0)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_one_unit_is_removed_and_every_bit_comes_back(family: str) -> None:
    space = space_of(tiny_model(family).config)
    for pruning_type, _, _ in sample_units(space, space.types, 1, 0):
        comes_back(family, pruning_type)


def comes_back(family: str, pruning_type: str) -> None:
    model = tiny_model(family)
    space, params = space_of(model.config), dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in params.items()}
    shapes = {name: tuple(weight.shape) for name, weight in params.items()}
    masks = group_masks(shapes, space.widths, space.head_dim, pruning_type, 0, 1)
    with removed(space, params, pruning_type, 0, 1):
        for name, weight in params.items():
            assert torch.equal(weight.detach(), before[name].masked_fill(masks[name], 0.0)), name
    assert all(torch.equal(weight.detach(), before[name]) for name, weight in params.items())


def test_a_pass_from_the_unit_s_layer_on_gives_the_loss_of_a_whole_pass(family: str) -> None:
    """All types, several micro-batches of unequal size; the whole pass is transformers' own, in fp64 sums."""
    model = tiny_model(family, num_hidden_layers=3).eval()
    space, params = space_of(model.config), dict(model.named_parameters())

    @torch.no_grad()
    def loss() -> float:
        logits = model(input_ids=IDS).logits[:, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))

    units = sample_units(space, space.types, 4, seed=2)
    ticks: list[int] = []
    found, whole = loss_increases(model, units, IDS, 4, CPU, ticks.append), loss()
    assert sum(ticks) == 2 * len(units)
    for sample, unit in zip(found, units, strict=True):
        with removed(space, params, *unit):
            assert sample.increase == pytest.approx(loss() - whole, rel=1e-3, abs=1e-5), unit
    assert any(abs(sample.increase) > 1e-2 for sample in found)


def test_passes_count_what_lies_behind_the_unit() -> None:
    """Untied: the layers of a row of 20, and the head's 40 x 61; from the last of 4 layers, a quarter of the layers."""
    space = space_of(tiny_model("llama-gqa", num_hidden_layers=4).config)
    layer = 20 * 2 * (2 * 24 * 40 + 2 * 12 * 40 + 3 * 40 * 52) + 4 * 20 * 20 * 24
    head = 20 * 2 * 40 * 61
    whole = 4 * layer + head
    assert passes(space, [("stem", 0, 3)], 20) == pytest.approx(2.0)
    assert passes(space, [("ffn", 3, 5), ("attention_query", 7, 1)], 20) == pytest.approx(
        1 + 2 * (layer + head) / whole
    )
    assert passes(space, [("depth", 0, 2)], 20) == pytest.approx(1 + (2 * layer + head) / whole)


@pytest.mark.parametrize(
    ("seconds", "tokens", "size"),
    [(0.2, None, (8, 7)), (1e-4, None, (8, 8)), (50.0, None, (8, 1)), (0.2, 96, (3, 1)), (0.2, 1000, (8, 3))],
)
def test_its_time_is_said_first_and_kept(
    seconds: float, tokens: int | None, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a forward pass takes `seconds`, one with its gradient as long again: 10 minutes are for 50 x 1.2 s."""
    request = job.ProbeRequest("m", [], Path(), tokens=tokens, sequence_length=32)
    monkeypatch.setattr(job, "_seconds", lambda act, device: seconds)
    monkeypatch.setattr(job, "passes", lambda space, units, length: 49.0)
    monkeypatch.setattr(job, "MOST_TOKENS", 16_384 // 8)
    said: list[str] = []
    row = IDS[:1].repeat(1, 2)[:, :32]
    assert job._size(request, tiny_model("llama-gqa"), row, [], CPU, said.append) == size
    total = size[0] * size[1] * 50 * seconds
    assert f"each on {size[0] * size[1] * 32:,} tokens" in said[0]
    assert (f"about {total / 60:.0f} minutes" if total >= 90 else f"about {max(1, round(total))} seconds") in said[0]


def test_scores_and_verdict() -> None:
    model = tiny_model("llama-gqa").eval()
    space = space_of(model.config)
    scores = criteria_scores(model, IDS.split(3), 2, CPU, lambda _: None)
    assert scores.keys() == FOR_DENSE
    mixture = tiny_model("qwen3-moe-gqa").eval()
    assert criteria_scores(mixture, [IDS], 3, CPU, lambda _: None).keys() == CRITERIA.keys()
    units = sample_units(space, PRUNING_TYPES, 6, seed=1)
    assert units == sample_units(space, PRUNING_TYPES, 6, seed=1)
    samples = loss_increases(model, units, IDS, 4, CPU, lambda _: None)
    assert [(each.type, each.row, each.unit) for each in samples] == units
    assert not any(weight.grad is not None for weight in model.parameters())
    perfect = {"truth": {kind: torch.zeros_like(score) for kind, score in scores["fisher"].items()}}
    for sample in samples:
        perfect["truth"][sample.type][sample.row, sample.unit] = 2.0 * sample.increase
    verdict = judge(samples, perfect)["truth"]["all"]
    assert verdict["rank_correlation"] == pytest.approx(1.0)
    harmful = [sample for sample in samples if sample.increase > 0.0]  # over all, chance may make the sum negative
    assert len(harmful) > 5
    assert judge(harmful, perfect)["truth"]["all"]["scale"] == pytest.approx(2.0)
    assert judge([Sample("ffn", 0, 0, 1.0), Sample("ffn", 0, 1, 2.0)], scores)["random"]["ffn"]["units"] == 2


def test_the_scale_is_the_sum_of_scores_over_the_sum_of_true_increases() -> None:
    """Neither the median nor the mean of ratios, which here are 4 and 7; units whose removal helps count too."""
    samples = [Sample("ffn", 0, unit, increase) for unit, increase in enumerate([1.0, 0.5, 2.5])]
    samples += [Sample("stem", 0, 0, -1.0), Sample("stem", 0, 1, 4.0)]
    scores = {"x": {"ffn": torch.tensor([[4.0, 8.0, 2.5, 99.0]]), "stem": torch.tensor([[0.5, 1.0]])}}
    verdict = judge(samples, scores)["x"]
    assert verdict["ffn"]["scale"] == pytest.approx(14.5 / 4.0)
    assert verdict["stem"]["scale"] == pytest.approx(1.5 / 3.0)
    assert verdict["all"]["scale"] == pytest.approx(16.0 / 7.0)
    assert math.isnan(judge([Sample("stem", 0, 0, -1.0)], scores)["x"]["stem"]["scale"])


def test_conversations_are_probed_and_their_tokens_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.full_like(IDS, -100)
    labels[:, 5:9] = IDS[:, 6:10]
    rows = torch.stack([IDS, labels], dim=-1)
    model = tiny_model("llama-gqa")
    monkeypatch.setattr(job, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(job, "load_model", lambda path, device: model)
    monkeypatch.setattr(job, "load_corpora", lambda *_, **__: ([SimpleNamespace(weight=1.0)], []))
    monkeypatch.setattr(job, "BatchStream", lambda _, __, count, seed: SimpleNamespace(batch=lambda step: rows[:count]))
    monkeypatch.setattr(job, "plot_probe", lambda *_: None)
    request = job.ProbeRequest("m", ["x"], tmp_path, types=("ffn",), units=1, tokens=80, sequence_length=20)
    found = job.run_probe(request, lambda line: None)
    assert found["tokens"] == 80
    (unit,) = found["units"]
    with removed(space_of(model.config), dict(model.named_parameters()), "ffn", unit["row"], unit["unit"]):
        without = float(row_losses(model, rows[:4], CPU).mean())
    assert unit["increase"] == pytest.approx(without - float(row_losses(model, rows[:4], CPU).mean()), abs=1e-5)


def test_the_command(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "probe"
    arguments = ["probe", str(world.folder / "source"), "--data", str(world.folder / "train.jsonl"), "--out", str(out)]
    arguments += ["--units", "5", "--tokens", "512", "--sequence-length", "32", "--depth"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    streams = capsys.readouterr()
    table = streams.out
    assert "each on 512 tokens, will take about" in streams.err
    result = json.loads((out / "probe.json").read_text())
    assert result["criteria"].keys() == FOR_DENSE
    assert all(name in table for name in FOR_DENSE)
    assert {unit["type"] for unit in result["units"]} == set(PRUNING_TYPES)
    assert (out / "probe.png").stat().st_size > 20_000
    with pytest.raises(SystemExit) as stop:
        main([*arguments[:-1], "--sequence-length", "512"])
    assert stop.value.code == 2
    assert "more than the model's 64 positions" in capsys.readouterr().err
