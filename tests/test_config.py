import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientllm.config import (
    GONE,
    CostTarget,
    DataConfig,
    DataSource,
    DistillConfig,
    PruneConfig,
    Recipe,
    RunConfig,
    TrainConfig,
    Trait,
    WidthTarget,
    dump_recipe,
    load_recipe,
    without_gone,
)
from efficientllm.config.fields import Section
from efficientllm.config.reference import free_keys
from efficientllm.errors import UsageError
from efficientllm.models.flops import FlopsPerToken
from efficientllm.pruning.costs import ActiveParams, KVCache, Params, TableCost
from efficientllm.pruning.dimensions import EXPERT_TYPES, PRUNING_TYPES, VOCAB
from efficientllm.pruning.schedule import CURVES
from efficientllm.pruning.selection import ORDERS
from efficientllm.sizes import Amount

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
BASE = """
source: org/model
data: {train: [a.txt], sequence_length: 1024}
train: {tokens: 60M, batch_tokens: 32K, lr: 1.5e-3}
prune: {target: 469M}
run: {dir: runs/x}
"""
Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(*overrides: str, text: str = BASE) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load


def refusal(load: Load, *overrides: str, text: str = BASE) -> str:
    """The message of a refused recipe; always one line."""
    with pytest.raises(UsageError) as error:
        load(*overrides, text=text)
    message = str(error.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


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
        ("0.02", 0.02, ()),
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
        "data": {"train": draw(st.lists(names, min_size=1, max_size=3)), "validation": draw(st.none() | names)},
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr is not a recipe key: did you mean train.lr?"),
        ("trian.lr=1", "trian is not a recipe key: did you mean train?"),
        ("run.zzz=1", "run.zzz is not a recipe key: the keys here are dir, checkpoint_every, keep, "),
        ("data.train={pth: b}", "data.train[0].pth is not a recipe key: did you mean data.train[0].path?"),
        ("prune.target={hiden: 4}", "prune.target.hiden is not a recipe key: did you mean prune.target.hidden?"),
        ("prune.floors.hiden=3", "prune.floors.hiden is not a recipe key: did you mean prune.floors.hidden?"),
        ("train.lr=null", "train.lr is missing: add it to the recipe"),
        ("train=null", "train is missing: add it to the recipe"),
        ("train=3", "train should be a mapping of keys to values, not 3"),
        ("train.lr=fast", "train.lr should be a valid number, not 'fast'"),
        ("train.lr=yes", "train.lr: true is not a number"),
        ("train.lr=.nan", "train.lr should be a finite number, not nan"),
        ("train.lr=0", "train.lr should be greater than 0, not 0"),
        ("train.tokens=lots", "train.tokens: 'lots' is not a count: write a whole number"),
        ("train.tokens=-5", "train.tokens: -5 is not a count: write a whole number that is not negative"),
        ("train.batch_tokens=0", "train.batch_tokens should be greater than 0, not 0"),
        ("train.schedule=wds", "train.schedule should be 'wsd', 'cosine' or 'constant', not 'wds'"),
        ("train.betas=[0.9, 1]", "train.betas[1] should be less than 1, not 1"),
        ("train.betas=0.9", "train.betas should be a list, not 0.9"),
        ("train.device=gpu", "train.device: 'gpu' is no device: write auto, cpu, cuda, cuda:1, mps or xpu"),
        ("train.warmup=90%", "train.warmup (90%) and train.decay (20%) together are longer than the run"),
        ("data.train=[]", "data.train should have at least 1 item, not 0"),
        (
            "data.train={path: org/d:n, name: m}",
            "data.train[0].name is gone: write it into the path, such as",
        ),
        ("data.validation={path: a, split: m}", "data.validation[0].split is gone: write it into the path"),
        ("prune.align={hidden: 64}", "prune.align: give one multiple for both widths, such as prune.align=64"),
        ("data.sequence_length=4", "data.sequence_length should be greater than or equal to 8, not 4"),
        ("data.validation=60%", "data.validation should be less than 0.5, not '60%'"),
        ("prune.target=100%", "prune.target: '100%' is no size to prune to: write a parameter count such as 469M"),
        ("prune.target={flop: 40%}", "prune.target.flop is not a recipe key: did you mean prune.target.flops?"),
        ("prune.target={flops: 120%}", "prune.target.flops: '120%' is no size to reach: write a ratio such as 50%"),
        ("prune.target={latency: 12}", "prune.target.latency: 12 is no latency to reach: write a ratio such as 50%"),
        ("prune.target={flops: 40%, latency: 40%}", "a size to prune to is in one cost: give one of active, flops"),
        (
            "prune={target: {flops: 40%}, cost: flops, ladder: [{flops: 80%}, 60%]}",
            "prune.cost is flops, but prune.ladder[1] is in params",
        ),
        ("prune={target: 40%, ladder: [{flops: 80%}]}", "prune.ladder[0] is in flops, but prune.cost counts params"),
        ("prune.latency_table=t.json", "prune.latency_table has no effect with prune.cost params"),
        ("prune.target={flops: 40%}", "prune.target is in flops, but prune.cost counts params: set prune.cost: flops"),
        ("prune.cost=flops", "prune.cost is flops, but prune.target is in params: write it as {flops: 40%}"),
        ("prune.latency_table=a.json", "prune.latency_table has no effect with prune.cost params: remove it"),
        ("prune.cost=energy", "prune.cost should be 'params', 'active', 'flops', 'kv-cache' or 'latency', not"),
        (
            "train.batch_tokens=1000",
            "train.batch_tokens (1000) is less than one row of data.sequence_length (1024): raise it to a row or more",
        ),
        ("prune.target={}", "prune.target names no width: give one or more of layers, hidden, heads"),
        ("prune.target.hidden=8", "override 'prune.target.hidden=8': prune.target has no keys in this recipe, so set"),
        ("prune.saliency=taylor", "prune.saliency: there is no saliency criterion 'taylor'; did you mean 'taylor-"),
        ("prune.saliency={fnn: flap}", "prune.saliency: 'fnn' is no pruning type here; choose among attention"),
        ("prune.saliency={ffn: 3}", "prune.saliency: there is no saliency criterion '3'"),
        (
            "prune.saliency=[flap]",
            "prune.saliency: ['flap'] is no criterion: write a name such as flap, or one by type",
        ),
        ("prune.bound=2", "prune.bound: 2 is not a fraction: write a share such as 2% or 0.02"),
        ("prune.align=Auto", "prune.align: 'Auto' is no alignment: write auto, or a multiple such as 64"),
        (
            "prune.types=[fnn]",
            "prune.types[0] should be 'attention', 'attention_query', 'ffn', 'stem', 'depth', 'expert', "
            "'expert_ffn' or 'vocab'",
        ),
        ("prune.types=[ffn, ffn]", "prune.types names ffn more than once: drop the repetition"),
        (
            "train.warmup=50%",
            "pruning starts at the end of train.warmup (50%), which must come before prune.end (30M tokens)",
        ),
        ("prune.start=60%", "prune.start (60%) must come before prune.end (30M tokens)"),
        ("prune.end=70M", "prune.end (70M) lies beyond train.tokens (60M): lower it"),
        ("prune.end=110%", "prune.end: '110%' is no place in a run: write a share of it such as 15% or 0.15"),
        ("run.checkpoint_every=0", "run.checkpoint_every: an interval cannot be zero: write one such as 10% or 5M"),
        ("run.dir=2024-01-01", "run.dir should be a valid string, not datetime.date(2024, 1, 1)"),
        ("train.lr", "override 'train.lr' should read section.key=value, such as train.lr=1e-3"),
        (".lr=3", "override '.lr=3' should read section.key=value"),
        ("source.lr=3", "override 'source.lr=3': source has no keys in this recipe"),
        ("train.lr=[1", "the value in override 'train.lr=[1' is not valid YAML at line 1, column 3: "),
        ("run.dir=2024-13-01", "the value in override 'run.dir=2024-13-01' is not valid YAML: month must be"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(load: Load, override: str, message: str) -> None:
    assert refusal(load, override).startswith(message)


def test_a_teacher_alone_serves_scores_that_need_no_gradient_of_its_loss(load: Load) -> None:
    """At first the source is its own teacher, and that loss has none."""
    assert load("distill.weight=1").distill is not None
    wanted = "distill.weight 1 leaves no gradient to prune by, since at first the source is its own teacher"
    assert refusal(load, "distill.weight=1", "prune.saliency={ffn: taylor-element}").startswith(wanted)


def test_hidden_states_want_a_teacher_at_hand_and_channels_as_they_were(load: Load) -> None:
    recipe = load("distill.hidden=1")
    assert recipe.distill is not None
    assert recipe.distill.hidden == 1.0
    assert refusal(load, "distill.hidden=1", "distill.samples=50").startswith("distill.hidden needs a teacher that is")
    wanted = "distill.hidden compares residual channels with the teacher's, and prune.rotate makes others of them"
    assert refusal(load, "distill.hidden=1", "prune.rotate=auto").startswith(wanted)


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
    ("overrides", "message"),
    [
        (["prune.every=1", "prune.end=5%"], "prune.end has no effect beside prune.every, which sets the pace"),
        (["prune.every=1", "prune.curve=cubic"], "prune.curve has no effect beside prune.every"),
        (["prune.every=1", "prune.start=60M"], "prune.start (60M) must come before the end of the run"),
        (
            ["prune.mode=iterative", "prune.end=5%"],
            "prune.end has no effect with prune.mode iterative, which sets",
        ),
        (
            ["prune.saliency={depth: magnitude, ffn: flap}"],
            "prune.saliency.depth has no effect: depth is not in prune.types",
        ),
        (["prune.mode=one-shot", "prune.bound=5%"], "prune.bound has no effect with prune.mode one-shot"),
        (["train.schedule=cosine", "train.decay=10%"], "train.decay has no effect with train.schedule cosine"),
        (["train.schedule=constant", "train.min_lr=0"], "train.min_lr has no effect with train.schedule constant"),
    ],
)
def test_options_without_effect_are_refused(load: Load, overrides: list[str], message: str) -> None:
    assert refusal(load, *overrides).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: it should have the keys source, data, train and run"),
        ("- a", "is not a mapping: it should have the keys"),
        ("a: [", "is not valid YAML at line 1, column 5: "),
        ("a: 1\nb: 2\na: 3", "is not valid YAML at line 3, column 1: a is given twice"),
        ("a: \x00", "is not valid YAML: special characters are not allowed"),
        ("a: !!python/name:os.system x", "is not valid YAML at line 1, column 4: could not determine a constructor"),
        ("[1]: 2", "is not valid YAML at line 1, column 1: found unhashable key"),
        ("{}", "source is missing: add it to the recipe"),
        ("1: 2", "1 is not a recipe key: the keys here are source, tokenizer, init"),
        ("'': 2", " is not a recipe key: the keys here are source, tokenizer, init"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(load: Load, text: str, message: str) -> None:
    assert message in refusal(load, text=text)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    for path, message in [
        (tmp_path / "none.yaml", f"there is no recipe {tmp_path / 'none.yaml'}: check the path"),
        (tmp_path, f"recipe {tmp_path} cannot be read (Is a directory): give a readable YAML file"),
        (binary, f"recipe {binary} is not text in UTF-8: give a YAML file"),
    ]:
        with pytest.raises(UsageError) as error:
            load_recipe(path)
        assert str(error.value) == message


def test_every_field_is_described() -> None:
    for section in Section.__subclasses__():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def choices(field: str) -> tuple[str, ...]:
    """The words that a key of the prune section takes, without those of null."""
    annotation = PruneConfig.model_fields[field].annotation
    inner = [each for each in get_args(annotation) if not isinstance(each, str)]
    return get_args(inner[0]) if inner else get_args(annotation)


def test_lists_of_words_are_those_of_the_pruning_room() -> None:
    """Words that a type checker is to know stand in config a second time."""
    assert choices("types") == (*PRUNING_TYPES, *EXPERT_TYPES, VOCAB)
    assert set(choices("curve")) == {*CURVES, "exponential"}
    assert set(choices("selection")) == {"raw", "interleaved", *ORDERS}
    costs = (Params, ActiveParams, FlopsPerToken, KVCache, TableCost)
    assert choices("cost") == tuple(each.__dataclass_fields__["name"].default for each in costs)
    sizes = {name.replace("_", "-") for name in CostTarget.model_fields}
    assert sizes == {*choices("cost")} - {"params"}


@pytest.mark.parametrize("key", [key for key in GONE if "[]" not in key and not key.startswith("prune.align.")])
def test_a_key_that_went_is_refused_with_what_to_do_instead(load: Load, key: str) -> None:
    section, _, name = key.rpartition(".")
    fields: dict[str, type[Section]] = {"": Recipe, "data": DataConfig, "train": TrainConfig, "prune": PruneConfig}
    assert name not in (fields | {"distill": DistillConfig, "run": RunConfig})[section].model_fields
    assert refusal(load, f"{key}=1") == f"{key} is gone: {GONE[key].instead}"


def test_what_an_older_version_has_dumped_loads_where_nothing_else_was_meant(load: Load) -> None:
    text = dump_recipe(load("data.train=org/data:en:train", "prune.align=64", "data.validation=b.txt"))
    old = yaml.safe_load(text)
    old["source_tokens"] = None
    old["data"] |= {"text_column": "text", "train": [{"path": "org/data", "name": "en", "split": "train"}]}
    old["prune"] |= {"ema": 0.5, "compact_at": "4%", "align": {"hidden": 64, "intermediate": 64}, "order": "saliency"}
    old["prune"] |= {"correction_damping": 0.3, "calibration_tokens": None}
    old["prune"]["latency_on"] = {"device": "cpu", "dtype": "fp32"}  # it has only said what to expect of the table
    old["run"]["log_every"] = 10
    assert Recipe.model_validate(without_gone(old)) == load(text=text)
    old["prune"]["ema"] = 0.9
    with pytest.raises(UsageError, match=r"^prune\.ema is gone"):
        Recipe.model_validate(without_gone(old))


def test_selection_auto_is_the_old_word_for_raw_and_calibrated_is_gone(load: Load) -> None:
    assert load("prune.selection=auto") == load("prune.selection=raw") == load()
    old = yaml.safe_load(dump_recipe(load()))
    old["prune"] |= {"selection": "calibrated", "calibration_tokens": "2K"}
    said = "prune.selection: calibrated is gone, since a measured factor a type chose a worse shape"
    assert refusal(load, "prune.selection=calibrated").startswith(said)
    with pytest.raises(UsageError, match=said):  # as the config.yaml of a run that is to go on
        Recipe.model_validate(without_gone(old))


@pytest.mark.parametrize(
    ("section", "old", "overrides"),
    [
        ("data", {"validation_fraction": "1%", "validation": None}, ["data.validation=1%"]),
        (
            "data",
            {
                "text_column": "content",
                "train": [
                    {"path": "a.jsonl", "text_column": None},
                    {"path": "b.jsonl", "text_column": "body"},
                    "c.jsonl",
                ],
                "validation": [{"path": "d.jsonl"}],
            },
            [
                "data.train=[{path: a.jsonl, text_column: content}, {path: b.jsonl, text_column: body}, "
                "{path: c.jsonl, text_column: content}]",
                "data.validation={path: d.jsonl, text_column: content}",
            ],
        ),
        (
            "prune",
            {"order": "ffn-first", "selection": "calibrated", "target": {"hidden": 512}},
            ["prune.selection=ffn-first", "prune.target={hidden: 512}"],
        ),
    ],
)
def test_what_an_older_version_has_dumped_goes_on_under_the_key_that_came_after(
    load: Load, section: str, old: dict[str, Any], overrides: list[str]
) -> None:
    content = yaml.safe_load(dump_recipe(load()))
    del content["data"]["validation"]
    before = content | {section: content[section] | old}
    assert Recipe.model_validate(without_gone(before)) == load(*overrides)
    assert before[section] == content[section] | old  # what was given stays as it was


@pytest.mark.parametrize("share", ["0.001", "1e-3", "'1E-3'", "1.0e-3", "0.1%", "1e-1%"])
def test_a_share_to_hold_out_is_no_path(load: Load, share: str) -> None:
    assert load(f"data.validation={share}").data.held_out == 1e-3


def test_the_config_of_a_run_folder_is_read_as_one_that_an_older_version_may_have_dumped(
    load: Load, tmp_path: Path
) -> None:
    """`efficientllm prune RUN/config.yaml` is what users are told to type."""
    text = BASE.replace("469M", "469M, ema: 0.5")
    assert refusal(load, text=text).startswith("prune.ema is gone")
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    assert load_recipe(config) == load()


def test_facts_stand_in_the_definitions() -> None:
    assert PruneConfig.having(Trait.ARM) == {"target", "cost", "ladder", "mode", "saliency", "correction"}
    assert free_keys()["data"] == {"cache_dir", "workers"}
