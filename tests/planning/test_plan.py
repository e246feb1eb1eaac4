"""The plan against runs: FLOPs, tokens, events; memory against what a process really takes; bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from conftest import World, tiny_config
from efficientllm.cli import main
from efficientllm.cli.plan import _fit
from efficientllm.config import Recipe, TrainConfig
from efficientllm.jobs.prune import run
from efficientllm.models.flops import forward_flops
from efficientllm.models.loading import load_config, load_tokenizer
from efficientllm.models.space import build, space_of
from efficientllm.planning.gpus import Gpu
from efficientllm.planning.memory import StepMemory, step_memory
from efficientllm.planning.plan import Estimate, estimate_of
from efficientllm.training import planning
from efficientllm.training.run_plan import run_plan
from processes import call


def planned(world: World, recipe: dict[str, object]) -> Estimate:
    return estimate_of(run_plan(Recipe.model_validate(recipe), load_config(str(world.folder / "source"))), bf16=False)


def test_plain_training_costs_what_was_planned(world: World) -> None:
    recipe = world.recipe("unpruned")
    del recipe["prune"]
    plan = planned(world, recipe)
    summary = run(Recipe.model_validate(recipe), lambda line: None)
    assert plan.flops == summary["flops"]
    assert plan.steps * plan.batch_tokens == summary["tokens"] == sum(plan.phases)
    assert (plan.events, plan.compactions, plan.flops_by_mode) == (0, 0, {})


@pytest.mark.parametrize("saliency", ["gate-fisher", "taylor-element", "sparsegpt", "magnitude"])
def test_a_pruned_run_costs_about_what_was_planned(world: World, saliency: str) -> None:
    """Without correction, on a path that both know, whatever its scores look at."""
    path = {"selection": "interleaved", "target": {"hidden": 28, "intermediate": 24}}
    prune = path | {"correction": "none", "end": "75%", "bound": 1.0, "saliency": saliency}
    recipe = world.recipe(f"as-planned-{saliency}", prune=prune, train={"tokens": 96 * 256})
    plan = planned(world, recipe)
    summary = run(Recipe.model_validate(recipe), lambda line: None)
    assert plan.flops == pytest.approx(summary["flops"], rel=0.01)
    assert plan.flops_by_part.looks == pytest.approx(summary["flops_by_part"]["looks"], rel=0.02)
    assert plan.target == summary["result"]["parameters"]
    assert sum(plan.phases) == summary["tokens"]
    assert plan.phases[:2] == (492, 72 * 256 - 492)  # 2 % of warm-up, then to 75 %


def test_a_run_at_default_settings_costs_about_what_was_planned(world: World, tmp_path: Path) -> None:
    """Looks and correction are half of it, with 24 steps for half of the parameters."""
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 6}
    more = {"vocab_size": 300, "head_dim": 8, "intermediate_size": 256, "tie_word_embeddings": True}
    torch.manual_seed(0)
    build(tiny_config("llama-gqa", **shape, **more)).save_pretrained(tmp_path)
    load_tokenizer(str(world.folder / "source")).save_pretrained(tmp_path)
    recipe = Recipe.model_validate(world.recipe("by-default", source=str(tmp_path)))  # type: ignore[arg-type]
    plan = estimate_of(run_plan(recipe, load_config(str(tmp_path))), bf16=False)
    summary = run(recipe, lambda line: None)
    assert plan.flops == pytest.approx(summary["flops"], rel=0.1)
    assert plan.pruning_flops == pytest.approx(plan.flops - summary["flops_by_part"]["steps"], rel=0.2)
    assert plan.refreshes == pytest.approx(summary["refresh_tokens"] / plan.batch_tokens, abs=2)
    assert plan.compactions == pytest.approx(summary["compactions"], abs=2)


def test_compacting_at_the_end_alone_and_ladders_and_modes_can_be_planned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "COMPACT_AT", 1.0)
    once = planned(world, world.recipe("once"))
    assert once.compactions == 1
    ladder = planned(world, world.recipe("ladder", prune={"ladder": ["80%", "65%"]}))
    assert ladder.compactions == 3
    shot = planned(world, world.recipe("shot", prune={"mode": "one-shot", "bound": None, "end": None}))
    assert (shot.compactions, shot.refreshes) == (1, 8)
    assert once.flops_by_mode["one-shot"] == shot.flops == shot.flops_by_mode["one-shot"]
    given = planned(world, world.recipe("given", prune={"target": {"intermediate": 24}}))
    assert (once.suits, given.suits) == ("loop", "")
    assert once.flops_by_mode["loop"] == once.flops != once.flops_by_mode["iterative"]
    short = world.recipe("short", train={"tokens": 2 * 256, "batch_tokens": 256}, prune={"end": "100%", "start": 300})
    assert planned(world, short).flops_by_mode.keys() == {"loop"}  # no batch is left for the others after token 300
    wide = planned(world, world.recipe("wide", prune={"saliency": "wanda", "end": "50%"}))
    assert wide.refreshes == 0
    assert wide.flops_by_part.looks > 0
    assert wide.pruning_flops > 0


def test_a_bug_in_planning_is_no_user_s_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Estimate:
        raise ValueError("a bug")

    monkeypatch.setattr("efficientllm.planning.plan.estimate_of", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["plan", str(world.write("broken"))])


def test_fp32_is_planned_at_the_rate_of_fp32(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = world.write("rates")
    hours = []
    for precision in ("bf16", "fp32"):
        assert call("plan", recipe, "--gpu", "h100-80gb", "--json", f"train.precision={precision}") == 0
        hours.append(json.loads(capsys.readouterr().out)["hours"])
    assert hours[1] / hours[0] == pytest.approx(989 / 67)


def test_what_does_not_fit_gets_a_micro_batch_that_would() -> None:
    gpu = Gpu("small", 1e12, 1e12, 1000.0, "a sheet")
    train = {"tokens": 10**6, "batch_tokens": 8 * 32, "micro_batch": 8, "lr": 1e-3}
    data = {"train": "text.txt", "sequence_length": 32}
    recipe = Recipe.model_validate({"source": "a/b", "data": data, "train": train, "run": {"dir": "run"}})
    step = StepMemory(50, 50, 100, 700, 100)  # 200 stay, 100 a row: seven rows in 920
    assert "train.micro_batch=7 would" in _fit(gpu, step.total, step, recipe)
    assert "fits in" in _fit(gpu, step.total - 100, step, recipe)
    assert "not with train.micro_batch=1 either" in _fit(gpu, step.total + 700, step, recipe)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_what_a_process_takes() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import plan as benchmark
    finally:
        sys.path.pop(0)
    shape, rows, length, options = benchmark.SHAPES["8 M, 8 x 256"]
    shape = benchmark.COMMON | shape
    measured = benchmark.measured(shape, rows, length, options)
    assert benchmark.predicted(shape, rows, length, options) == pytest.approx(measured, rel=0.15)


def test_parts_of_memory(some_family: str) -> None:
    from efficientllm.models.space import space_of

    config = tiny_config(some_family)
    train = {"tokens": 10**6, "batch_tokens": 8 * 64, "lr": 1e-3}
    small = step_memory(config, TrainConfig(micro_batch=2, **train), 64, bf16=False)
    large = step_memory(config, TrainConfig(micro_batch=4, **train), 64, bf16=False)
    less = step_memory(config, TrainConfig(micro_batch=4, gradient_checkpointing=True, **train), 64, bf16=False)
    watched = step_memory(
        config, TrainConfig(micro_batch=4, gradient_checkpointing=True, **train), 64, bf16=False, gates=True
    )
    assert less.total < watched.total
    assert small.weights == small.gradients == small.optimizer // 2 == 4 * space_of(config).num_params()
    assert large.activations == pytest.approx(2 * small.activations, rel=0.05)
    assert less.activations < large.activations
    logits = 4 * 4 * 64 * config.vocab_size
    assert large.temporary >= logits


def test_the_command_needs_a_config_alone(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("llama-gqa", vocab_size=300).save_pretrained(tmp_path)
    recipe = world.write("to-plan", source=str(tmp_path))  # type: ignore[arg-type]
    assert call("plan", recipe, "--gpu", "h100-80gb") == 0
    out = capsys.readouterr().out
    assert "fits in 80.00 GB" in out
    assert "hours" in out
    assert call("plan", recipe, "--json", "prune.target=60%") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == int(0.6 * found["parameters"])
    assert found["hours"] is None
    assert call("plan", recipe, "--gpu", "h10") == 2
    assert "did you mean h100-80gb?" in capsys.readouterr().err
    assert call("plan", recipe, "prune.target=500") == 2
    assert "aim higher" in capsys.readouterr().err
    assert not (world.folder / "runs" / "to-plan").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_mixture_of_experts_has_a_memory(bf16: bool) -> None:
    """Of widths for which its products are grouped; twice the experts, twice their weights and as many activations."""
    train = TrainConfig.model_validate({"tokens": 4096, "batch_tokens": 512, "micro_batch": 2, "lr": 1e-3})
    few, many = (
        step_memory(
            tiny_config("qwen3-moe-gqa", hidden_size=64, moe_intermediate_size=32, num_experts=experts),
            train, 128, bf16=bf16, gates=True,
        )
        for experts in (8, 16)
    )  # fmt: skip
    layers = tiny_config("qwen3-moe-gqa").num_hidden_layers
    assert many.weights - few.weights == 4 * layers * 8 * (3 * 64 * 32 + 64)
    assert 0 < many.activations - few.activations < 0.2 * few.activations


@pytest.mark.parametrize(
    ("prune", "said"),
    [
        ({"start": "25%", "end": "50%"}, ", pruned from token 1,536 to 3,072"),
        ({"start": "25%", "end": None, "every": 1}, ", pruned from token 1,536 on"),
        ({"mode": "one-shot"}, ", pruned at token 0"),
        (None, ""),
    ],
)
def test_a_run_says_what_it_is_about_to_do(world: World, prune: dict[str, object] | None, said: str) -> None:
    recipe = world.recipe("outline")
    target = {"target": "80%", "floors": {"hidden": 8, "intermediate": 8}}
    recipe["prune"] = None if prune is None else target | {key: each for key, each in prune.items() if each}
    plan = run_plan(Recipe.model_validate(recipe), load_config(str(world.folder / "source")))
    assert plan.outline == "24 steps of 256 tokens (8 rows of 32) at a peak rate of 0.01" + said


def test_another_teacher_costs_what_it_costs(world: World) -> None:
    """Twice the layers, twice the operations of its blocks; its weights stand beside the student's."""
    recipe = Recipe.model_validate(world.recipe("taught", distill={"weight": 0.5}))
    config = tiny_config("llama-gqa", vocab_size=300, tie_word_embeddings=True)
    larger = tiny_config("llama-gqa", vocab_size=300, tie_word_embeddings=True, num_hidden_layers=4)
    own = estimate_of(run_plan(recipe, config), bf16=False)
    other = estimate_of(run_plan(recipe, config), bf16=False, teacher=larger)
    rows, length = recipe.train.batch_rows(32), 32
    passes = [forward_flops(space_of(each), rows, length).base for each in (config, larger)]
    assert other.step_flops - own.step_flops == passes[1] - passes[0] == passes[0]
    layer = (30440 - 300 * 40 - 40) // 2
    assert other.memory.teacher - own.memory.teacher == 4 * 2 * layer
    assert own.memory.teacher == 4 * 30440
    streams = Recipe.model_validate(world.recipe("streams", distill={"hidden": 1.0}))
    compared = estimate_of(
        run_plan(streams, config), bf16=False
    )  # its stream of a micro-batch, before and between layers
    assert compared.memory.teacher - own.memory.teacher == 4 * 4 * 32 * 2 * 40
    assert compared.step_flops == own.step_flops
