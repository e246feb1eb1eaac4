"""Runs that prune by another cost: what may fall, where they land, a table of latencies, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import World, tiny_config
from efficientllm.cli import main
from efficientllm.models.flops import FlopsPerToken
from efficientllm.models.latency_table import LatencyTable, MeasuredOn, table_content
from efficientllm.models.space import space_of
from efficientllm.pruning.costs import KVCache
from efficientllm.pruning.groups import Widths
from efficientllm.reporting.journal import read_journal

SPACE = space_of(tiny_config("llama-gqa", vocab_size=300, tie_word_embeddings=True))
FLOORS = {"intermediate": 8, "hidden": 8}


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


def result(world: World, name: str) -> dict[str, Any]:
    return json.loads((world.folder / "runs" / name / "summary.json").read_text())["result"]


def write_table(path: Path, scale: float = 1.0, **changes: object) -> Path:
    """Latency that grows with hidden times FFN and with every head, over widths from the floors to the source."""
    grid = ((2,), (8, 24, 40), (1, 2), (1, 2), (8, 30, 52))
    seconds = [
        scale * (1e-3 + 1e-6 * hidden * ffn + 1e-4 * kv * queries)
        for hidden in grid[1]
        for kv in grid[2]
        for queries in grid[3]
        for ffn in grid[4]
    ]
    about: dict[str, Any] = {"family": "llama", "head_dim": 6, "vocabulary": 300, "dtype": "float32", "device": "cpu"}
    about |= {"threads": 1, "prompt": 8, "generate": 4, "batch": 1, "machine": {}} | changes
    path.write_text(json.dumps(table_content(LatencyTable(MeasuredOn(**about), grid, tuple(seconds)), {})))
    return path


def test_flops_as_target_and_currency(world: World) -> None:
    cost, source = FlopsPerToken(SPACE, 32), SPACE.widths
    ladder = [{"flops": "75%"}, {"flops": "60%"}]
    prune = {"cost": "flops", "target": {"flops": "45%"}, "ladder": ladder, "floors": FLOORS}
    assert call("prune", world.write("flops", prune=prune)) == 0
    widths = Widths(**result(world, "flops")["widths"])
    assert 0.99 * 0.45 * cost(source) - 1 <= cost(widths) <= 0.45 * cost(source)
    left = sorted(path.name for path in (world.folder / "runs" / "flops" / "ladder").iterdir())
    assert len(left) == 2
    assert all(name.startswith("flops-") for name in left)
    events = read_journal(world.folder / "runs" / "flops" / "events.jsonl")
    assert sum(event["saved"] for event in events) == cost(source) - cost(widths)


def test_kv_cache_takes_what_it_counts_and_nothing_else(world: World) -> None:
    prune = {"cost": "kv-cache", "target": {"kv_cache": "50%"}, "floors": FLOORS}
    path = world.write("by-cache", prune=prune)
    assert call("plan", path) == 0
    assert call("prune", path) == 0
    widths = Widths(**result(world, "by-cache")["widths"])
    assert widths == Widths(2, 40, 2, 1, 52)
    assert KVCache(6)(widths) * 2 == KVCache(6)(SPACE.widths)


def test_latency_by_a_table(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "table.json")
    prune = {"cost": "latency", "latency_table": str(table), "target": {"latency": "0.6x"}, "floors": FLOORS}
    path = world.write("fast", prune=prune)
    assert call("prune", path) == 0
    cost = LatencyTable(MeasuredOn("llama", 6, 300, "float32", "cpu", 1, 8, 4, 1, {}), *_grid(table)).cost()
    assert cost(Widths(**result(world, "fast")["widths"])) <= 0.6 * cost(SPACE.widths)
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
    asked = {"cost": "latency", "latency_table": str(table), "target": {"latency": "0.6x"}, "floors": FLOORS} | prune
    assert call("plan", world.write("refused", prune=asked)) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"target": {"kv_cache": "50%"}, "types": ["ffn", "stem"]}, "leaves nothing to fall that prune.cost kv-cache"),
        (
            {"target": {"intermediate": 30}},
            "narrows what prune.cost kv-cache does not count (ffn): leave prune.cost out",
        ),
        ({"target": {"kv_cache": "10%"}}, "is below 48, the least that the floors and the pruning types allow"),
    ],
)
def test_costs_that_do_not_fit(
    world: World, capsys: pytest.CaptureFixture[str], prune: dict[str, object], message: str
) -> None:
    assert call("plan", world.write("refused", prune={"cost": "kv-cache"} | prune)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_table_that_is_not_there(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    prune = {"cost": "latency", "target": {"latency": "60%"}}
    assert call("plan", world.write("refused", prune=prune)) == 2
    assert "prune.cost latency needs prune.latency_table" in capsys.readouterr().err
    assert call("plan", world.write("refused", prune=prune | {"latency_table": "none.json"})) == 2
    assert "there is no prune.latency_table none.json; measure one" in capsys.readouterr().err
