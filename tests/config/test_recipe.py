"""What a recipe says: values read as what they are, defaults that hang on others, and the same again from its dump."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientllm.config import (
    CostTarget,
    DataSource,
    Recipe,
    TrainConfig,
    WidthTarget,
    dump_recipe,
    load_recipe,
)
from efficientllm.sizes import Amount

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
Load = Callable[..., Recipe]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_project_load_and_dump_back(path: Path, load: Load) -> None:
    recipe = load_recipe(path)
    assert recipe.prune is not None
    assert load(text=dump_recipe(recipe)) == recipe


def test_published_recipes_are_all_there() -> None:
    assert {"smollm-1.7b-to-1.1b", "smollm-1.7b-to-469m", "smollm-360m-to-134m", "books"} <= {p.stem for p in RECIPES}


def test_sizes_and_places_are_typed(load: Load) -> None:
    recipe = load("prune.start=2M", "data.cache_dir=null", "train.lr=1e-3", "prune.align=64")
    assert recipe.train.tokens == 60_000_000
    assert recipe.train.lr == 1e-3  # PyYAML reads 1e-3 as text
    assert recipe.prune is not None
    assert recipe.prune.target == 469_000_000
    assert recipe.prune.start.tokens(recipe.train.tokens) == 2_000_000
    assert recipe.prune.end == "auto"
    assert recipe.prune.bound == 0.05
    assert recipe.prune.align == 64
    assert recipe.prune.floors.intermediate is None


@pytest.mark.parametrize(
    ("value", "target"),
    [
        ("469M", 469_000_000),
        ("40%", 0.4),
        ("0.4", 0.4),
        ("'0.4'", 0.4),
        ("{hidden: 512, heads: 8}", WidthTarget(hidden=512, heads=8)),
    ],
)
def test_targets_are_a_count_a_ratio_or_widths(load: Load, value: str, target: object) -> None:
    prune = load(f"prune.target={value}").prune
    assert prune is not None
    assert prune.target == target
    assert type(prune.target) is type(target)


@pytest.mark.parametrize(
    ("cost", "target", "amount", "written"),
    [
        ("flops", "{flops: 40%}", Amount(0.4, relative=True), {"flops": "40%"}),
        ("flops", "{flops: 1.2M}", Amount(1_200_000, relative=False), {"flops": "1.2M"}),
        ("kv-cache", "{kv_cache: 0.5x}", Amount(0.5, relative=True), {"kv_cache": "50%"}),
        ("latency", "{latency: 12.5ms}", Amount(0.0125, relative=False, timed=True), {"latency": "12.5ms"}),
        ("latency", "{latency: 0.02s}", Amount(0.02, relative=False, timed=True), {"latency": "20ms"}),
    ],
)
def test_targets_in_another_cost(load: Load, cost: str, target: str, amount: Amount, written: dict[str, str]) -> None:
    table = ["prune.latency_table=a.json"] if cost == "latency" else []
    recipe = load(f"prune.cost={cost}", f"prune.target={target}", *table)
    assert recipe.prune is not None
    assert isinstance(recipe.prune.target, CostTarget)
    assert recipe.prune.target.amount == amount
    assert yaml.safe_load(dump_recipe(recipe))["prune"]["target"] == written
    assert load(text=dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("a.txt", ("a.txt", None, None)),
        ("org/data:en:train", ("org/data", "en", "train")),
        ("org/data::train[:5%]", ("org/data", None, "train[:5%]")),
        ("{path: org/data:en, weight: 2}", ("org/data", "en", None)),
        ("C:/text/a.txt", ("C:/text/a.txt", None, None)),
        ("hf://datasets/x", ("hf://datasets/x", None, None)),
        ("./a:b.txt", ("./a:b.txt", None, None)),
    ],
)
def test_sources_are_paths_or_hub_ids(load: Load, value: str, source: tuple[str | None, ...]) -> None:
    quoted = value if value.startswith("{") else f"'{value}'"
    (found,) = load(f"data.train={value}").data.train
    assert load(f"data.train=[{quoted}]").data.train == (found,)
    assert (found.place, found.name, found.split) == source


@pytest.mark.parametrize(
    ("value", "held_out", "sources"),
    [
        ("1%", 0.01, ()),
        *((share, 1e-3, ()) for share in ("0.001", "1e-3", "'1E-3'", "1.0e-3", "0.1%", "1e-1%")),
        ("null", 0.005, ()),
        ("b.txt", None, ("b.txt",)),
        ("[b.txt, {path: 1%}]", None, ("b.txt", "1%")),
    ],
)
def test_validation_is_a_share_or_sources(load: Load, value: str, held_out: float, sources: tuple[str, ...]) -> None:
    data = load(f"data.validation={value}").data
    assert data.held_out == held_out
    assert data.validation_sources == tuple(DataSource(path=path) for path in sources)


def test_overrides_win_and_null_restores_the_default(load: Load) -> None:
    recipe = load("run.dir=a=b", "run.keep=5", "run.keep=7", "train.seed=3", "train.seed=null", "prune=null")
    assert (recipe.run.dir, recipe.run.keep, recipe.train.seed, recipe.prune) == ("a=b", 7, 0, None)
    assert load("prune=null", "prune.target=50%").prune == load("prune.target=50%").prune


def test_pruning_starts_once_the_learning_rate_is_there(load: Load) -> None:
    assert load("train.warmup=3M").pruning_starts == 3_000_000
    assert load("train.warmup=3M", "prune.every=2").pruning_starts == 3_000_000
    assert load("train.warmup=3M", "prune.start=0").pruning_starts == 0
    assert load("train.warmup=3M", "prune.start=2M").pruning_starts == 2_000_000
    for mode in ("one-shot", "iterative"):  # their weights are at rest until pruning is over, and then warm up
        assert load("train.warmup=3M", f"prune={{target: 50%, mode: {mode}}}").pruning_starts == 0
    assert load("prune=null").pruning_starts == 0


def test_a_short_run_prunes_over_more_of_its_steps(load: Load) -> None:
    def end(*overrides: str) -> int:
        return load("train.warmup=0", "train.batch_tokens=512K", *overrides).pruning_ends

    batch = 516_096  # 504 rows: whole micro-batches
    assert end("train.tokens=1B") == 150_000_000
    assert end("train.tokens=60M") == 20 * batch
    assert end("train.tokens=60M", "train.warmup=1M") == 20 * batch + 1_000_000
    assert end("train.tokens=1B", "train.warmup=2%") == 170_000_000
    assert end("train.tokens=1B", "prune.start=30%") == 450_000_000  # a long run has as long a span wherever it starts
    assert end("train.tokens=1B", "prune.start=40%") == 500_000_000
    assert end("train.tokens=8M") == 4_000_000
    assert end("train.tokens=8M", "prune.end=15%") == 1_200_000


@pytest.mark.parametrize(
    ("batch_tokens", "sequence_length", "rows"),
    [(32_000, 1024, 32), (32_768, 1024, 32), (4096, 1024, 4), (5000, 1024, 5), (100, 1024, 1), (12_288, 1024, 16)],
)
def test_batches_are_whole_micro_batches_where_they_can(batch_tokens: int, sequence_length: int, rows: int) -> None:
    train = TrainConfig(tokens=1_000_000, batch_tokens=batch_tokens, micro_batch=8, lr=1e-3)
    assert train.batch_rows(sequence_length) == rows
    step_tokens = rows * sequence_length
    assert (train.steps(sequence_length) - 1) * step_tokens < train.tokens <= train.steps(sequence_length) * step_tokens


positions = st.one_of(
    st.floats(0, 0.14).map(lambda x: f"{x:.6f}"), st.integers(2, 1_400_000).map(str), st.just("0%"), st.just("1M")
)
names = st.text(string.ascii_letters + string.digits + " ./_-:#'\"{}[]%&*!|>@`\t\u00e9\u4e16", min_size=1, max_size=20)
paths = names.map("./{}".format)  # as data.validation: a name such as 0 or 5% would be read as a share


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Valid recipes with every kind of field set, some left out."""
    schedule = draw(st.sampled_from(["wsd", "cosine", "constant"]))
    train = {
        "tokens": draw(st.integers(10**7, 10**13)),
        "batch_tokens": draw(st.integers(1024, 10**7)),
        "lr": draw(st.floats(1e-12, 1e3)),
        "schedule": schedule,
        "warmup": draw(positions),
        "betas": draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2)),
        **({"decay": draw(positions)} if schedule == "wsd" else {}),
        **({"min_lr": draw(st.floats(0, 1))} if schedule != "constant" else {}),
    }
    widths = st.dictionaries(
        st.sampled_from(["hidden", "heads", "kv_heads", "intermediate"]), st.integers(1, 10**6), min_size=1
    )
    ratio = st.floats(0, 1, exclude_min=True, exclude_max=True)
    pace = st.one_of(
        st.just({}),
        st.fixed_dictionaries({"every": st.integers(1, 100)}),
        st.fixed_dictionaries({"end": st.floats(0.3, 1), "curve": st.sampled_from(["linear", "exponential"])}),
    )
    prune = {
        "target": draw(st.one_of(st.integers(2, 10**12), ratio, widths)),
        "types": draw(st.lists(st.sampled_from(["attention", "ffn", "stem"]), min_size=1, unique=True)),
        "align": draw(st.one_of(st.just("auto"), st.integers(1, 512))),
        "bound": draw(ratio),
        **draw(pace),
    }
    return {
        "source": draw(names),
        "data": {"train": draw(st.lists(names, min_size=1, max_size=3)), "validation": draw(st.none() | paths)},
        "train": train,
        "prune": draw(st.none() | st.just(prune)),
        "run": {"dir": draw(names), "checkpoint_every": draw(st.sampled_from(["5M", "3%", None]))},
    }


@settings(max_examples=60, deadline=None)
@given(recipes())
def test_what_is_dumped_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_the_dump_is_resolved_and_readable(load: Load) -> None:
    dumped = yaml.safe_load(dump_recipe(load("prune.every=2", "train.schedule=cosine", "data.validation=b.txt")))
    assert dumped["train"]["tokens"] == "60M"
    assert dumped["train"]["weight_decay"] == 0.05
    assert dumped["prune"]["bound"] == "5%"
    assert dumped["run"]["checkpoint_every"] == "10%"
    assert not {"end", "curve"} & set(dumped["prune"])  # without effect
    assert "decay" not in dumped["train"]
