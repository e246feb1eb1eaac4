"""Runs that prune by another cost: what may fall, where they land, a table of latencies, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import World, tiny_config
from efficientllm.config import load_recipe
from efficientllm.errors import UsageError
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.latency_table import LatencyTable, MeasuredOn, family_of, table_content
from efficientllm.models.loading import load_config
from efficientllm.models.space import space_of
from efficientllm.pruning.costs import KVCache
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.journal import read_journal
from efficientllm.training.advisories import advisories_of
from efficientllm.training.planning import pruning_plan
from processes import call

SPACE = space_of(tiny_config("llama-gqa", vocab_size=300, tie_word_embeddings=True))
FLOORS = {"intermediate": 8, "hidden": 8}
ABOUT = MeasuredOn("llama", 6, 300, "float32", "cpu", 1, 8, 4, 1, {})


def result(world: World, name: str) -> dict[str, Any]:
    return json.loads((world.folder / "runs" / name / "summary.json").read_text())["result"]


def write_table(path: Path, scale: float = 1.0, error: float | None = None, **changes: object) -> Path:
    """Latency that grows with hidden times FFN and with every head, over widths from the floors to the source."""
    grid = ((2,), (8, 24, 40), (1, 2), (1, 2), (8, 30, 52))
    seconds = [
        scale * (1e-3 + 1e-6 * hidden * ffn + 1e-4 * kv * queries)
        for hidden in grid[1]
        for kv in grid[2]
        for queries in grid[3]
        for ffn in grid[4]
    ]
    content = table_content(LatencyTable(ABOUT, grid, tuple(seconds)), {"median_error": error})
    content["measured_on"] |= changes
    path.write_text(json.dumps(content))
    return path


def by_latency(table: Path) -> dict[str, object]:
    return {"cost": "latency", "latency_table": str(table), "target": {"latency": "0.6x"}, "floors": FLOORS}


def test_flops_as_target_and_currency(world: World) -> None:
    cost, source = FlopsPerToken(SPACE, 32), SPACE.widths
    ladder = [{"flops": "75%"}, {"flops": "60%"}]
    prune = {"cost": "flops", "target": {"flops": "45%"}, "ladder": ladder, "floors": FLOORS}
    assert call("prune", world.write("flops", prune=prune, train={"tokens": 12 * 256})) == 0
    widths = Widths(**result(world, "flops")["widths"])
    assert 0.97 * 0.45 * cost(source) <= cost(widths) <= 0.45 * cost(source)
    left = sorted(path.name for path in (world.folder / "runs" / "flops" / "ladder").iterdir())
    assert len(left) == 2
    assert all(name.startswith("flops-") for name in left)
    events = read_journal(world.folder / "runs" / "flops" / "events.jsonl")
    assert sum(event["saved"] for event in events) == cost(source) - cost(widths)


def test_kv_cache_takes_what_it_counts_and_nothing_else(world: World) -> None:
    prune = {"cost": "kv-cache", "target": {"kv_cache": "50%"}, "floors": FLOORS}
    path = world.write("by-cache", prune=prune, train={"tokens": 8 * 256})
    assert call("plan", path) == 0
    assert call("prune", path) == 0
    widths = Widths(**result(world, "by-cache")["widths"])
    assert widths == Widths(2, 40, 2, 1, 52)
    assert KVCache(6)(widths) * 2 == KVCache(6)(SPACE.widths)


def test_latency_by_a_table(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "table.json")
    path = world.write("fast", prune=by_latency(table), train={"tokens": 12 * 256})
    assert call("prune", path) == 0
    cost = LatencyTable(ABOUT, *_grid(table)).cost()
    saved = cost(SPACE.widths) - cost(Widths(**result(world, "fast")["widths"]))
    assert saved >= 0.4 * cost(SPACE.widths)
    events = read_journal(world.folder / "runs" / "fast" / "events.jsonl")
    assert sum(event["saved"] for event in events) == pytest.approx(saved)
    (world.folder / "runs" / "fast" / "summary.json").unlink()
    write_table(table, scale=2.0)
    assert call("prune", path) == 2
    assert "was begun with another prune.latency_table" in capsys.readouterr().err


def _grid(table: Path) -> tuple[Any, Any]:
    content = json.loads(table.read_text())
    return tuple(map(tuple, content["grid"].values())), tuple(content["seconds"])


@pytest.mark.parametrize(
    ("changes", "prune", "message"),
    [
        ({"family": "qwen2"}, {}, "was measured for family qwen2, but the source has llama"),
        ({"head_dim": 8}, {}, "was measured for head_dim 8, but the source has 6"),
        ({"vocabulary": 99}, {}, "was measured for vocabulary 99, but the source has 300"),
        (
            {},
            {"floors": {"hidden": 8, "intermediate": 4}},
            "covers intermediate 8 to 52, but the recipe may ask for 4 to 52; raise",
        ),
        ({"dtype": "int4"}, {}, "its measured_on.dtype is 'int4', none of float32, bfloat16, float16"),
        ({"device": "abacus"}, {}, "its measured_on.device is 'abacus', neither cpu nor cuda"),
        ({"batch": 0}, {}, "its measured_on.batch is 0, not a whole number above 0"),
        ({"threads": "one"}, {}, "its measured_on.threads is 'one', not a whole number above 0"),
        ({"family": None}, {}, "its measured_on.family is None, not a name"),
        ({"machine": 7}, {}, "its measured_on.machine is 7, not names with their values"),
        ({"error": -1}, {}, "its median_error is -1"),
        ({}, {"types": ["depth", "ffn"]}, "covers layers 2, but the recipe may ask for 1 to 2; leave depth out"),
        ({}, {"target": {"latency": "5us"}}, "the target of 5e-06 s is below 0.00116"),
        (None, {}, "is no table of latencies (it has no 'format')"),
    ],
)
def test_tables_that_do_not_fit(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object] | None,
    prune: dict[str, object],
    message: str,
) -> None:
    table = tmp_path / "table.json"
    if changes is None:
        table.write_text("{}")
    else:
        write_table(table, **changes)
    assert call("plan", world.write("refused", prune=by_latency(table) | prune)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999", '"many"'])
def test_a_grid_of_no_numbers_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    table = write_table(tmp_path / "table.json")
    table.write_text(table.read_text().replace("[8, 24, 40]", f"[8, 24, {value}]"))
    assert call("plan", world.write("refused", prune=by_latency(table))) == 2
    assert "is no table of latencies" in capsys.readouterr().err


def test_a_table_that_misses_a_width_nothing_may_narrow() -> None:
    """Of another source: no floor and no type of the recipe is at fault."""
    table = LatencyTable(ABOUT, ((3, 4), (8, 40), (1, 2), (1, 2), (60, 80)), (1.0,) * 32)
    source = SPACE.widths
    with pytest.raises(UsageError, match=r"covers layers 3 to 4, .* for 2 to 2; measure one of this source"):
        table.check_range("t.json", source.changed(hidden=8), source)
    table = replace(table, grid=((2,), *table.grid[1:]))
    with pytest.raises(UsageError, match=r"covers intermediate 60 to 80, .* for 52 to 52; measure one of this source"):
        table.check_range("t.json", source.changed(hidden=8), source)


def test_llama_and_mistral_without_a_window_share_a_table() -> None:
    """They compute the same function; with a window it is another one."""
    table = LatencyTable(replace(ABOUT, vocabulary=61), ((2,),) * 5, (1.0,))
    mistral = tiny_config("mistral-gqa-tied")
    assert family_of(mistral) == "llama"
    table.check("t.json", mistral)
    mistral.sliding_window = 16
    with pytest.raises(UsageError, match="was measured for family llama, but the source has mistral"):
        table.check("t.json", mistral)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (0.044, "8+4 tokens, batch 1, median error 4.4%"),
        (None, "error not known"),
        (0.25, "median error 25.0%, above 10%: shapes that are nearer to one another than that are not told apart"),
    ],
)
def test_plan_says_what_the_table_was_measured_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: float | None, said: str
) -> None:
    table = write_table(tmp_path / "table.json", error=error, machine={"device": "A processor"})
    assert call("plan", world.write("told", prune=by_latency(table))) == 0
    found = " ".join(capsys.readouterr().err.split())
    assert f"latency by {table}: float32 on cpu (A processor), " in found
    assert said in found
    assert ("above 10%" in found) == (error == 0.25)


def notes(world: World, name: str, **prune: object) -> tuple[str, ...]:
    recipe = load_recipe(world.write(name, prune=prune))
    return advisories_of(recipe, pruning_plan(recipe, load_config(recipe.source)))


def test_types_that_stay_out_are_named(world: World) -> None:
    (note, shapes) = notes(world, "out", cost="kv-cache", target={"kv_cache": "60%"}, floors=None)
    uncounted = "prune.cost kv-cache does not count attention_query, ffn, stem"
    assert note == f"{uncounted}: the result keeps the source's width there"
    assert shapes == "at 58 bytes of KV cache per token: one shape is feasible, of 48 bytes of KV cache per token"
    assert notes(world, "in", target={"hidden": 30}, floors={"hidden": 8}) == ()


def test_scores_that_are_not_in_nats_are_said_to_compare_types_by_scale_only(world: World) -> None:
    said = "scores of flap compare its types by scale only, as they are not in nats: gate-fisher, one type, or a"
    asked = {"saliency": "flap", "target": "85%", "floors": FLOORS}
    assert notes(world, "scale", **asked)[0].startswith(said)
    for name, more in {
        "one": {"types": ["ffn"]},
        "shape": {"target": {"hidden": 30}},
        "nats": {"saliency": None},
    }.items():
        assert not any("by scale" in note for note in notes(world, name, **asked | more))


def test_a_mapping_that_mixes_units_needs_a_target_in_widths(world: World) -> None:
    mixed = {"saliency": {"ffn": "flap"}, "floors": FLOORS}
    with pytest.raises(
        UsageError, match=r"ffn by flap.*name one criterion for all types, or give prune\.target as widths"
    ):
        notes(world, "mixed", target="85%", **mixed)
    assert notes(world, "mixed-widths", target={"hidden": 30}, **mixed | {"floors": {"hidden": 8}}) == ()
    assert notes(world, "mixed-alone", target="85%", types=["ffn"], **mixed)


def test_a_run_says_how_much_is_left_to_choose(world: World) -> None:
    """An FFN alone in steps of 20: 52, 40, 20 channels, of which one is maximal; with the stem there is a choice."""
    (said,) = notes(world, "ffn", target="85%", types=["ffn"], floors={"intermediate": 8}, align=20)
    assert said == "at 25,874 parameters: one shape is feasible, of 22,760 parameters"
    (said,) = notes(world, "stem", target="85%", types=["ffn", "stem"], floors=FLOORS, align=4)
    assert said == "at 25,874 parameters: 3 shapes are feasible, of 24,352 to 25,668 parameters"


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"target": {"kv_cache": "50%"}, "types": ["ffn", "stem"]}, "leaves nothing to fall that prune.cost kv-cache"),
        (
            {"target": {"intermediate": 30}},
            "narrows what prune.cost kv-cache does not count (ffn): leave prune.cost out",
        ),
        ({"target": {"kv_cache": "10%"}}, "is below 48, the least that the floors and the pruning types allow"),
        ({"cost": "latency", "target": {"latency": "60%"}}, "prune.cost latency needs prune.latency_table"),
        (by_latency(Path("none.json")), "there is no prune.latency_table none.json; measure one"),
    ],
)
def test_costs_that_do_not_fit(
    world: World, capsys: pytest.CaptureFixture[str], prune: dict[str, object], message: str
) -> None:
    assert call("plan", world.write("refused", prune={"cost": "kv-cache"} | prune)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
