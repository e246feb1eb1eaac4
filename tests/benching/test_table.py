"""A table of latencies: its grid, the shapes that check it, the file that a recipe then names, what is refused."""

from __future__ import annotations

import json
import math
import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from conftest import World, tiny_config
from efficientllm.benching import table
from efficientllm.benching.settings import Settings
from efficientllm.benching.table import grid_of, held_out_shapes, measure_table
from efficientllm.cli import main
from efficientllm.models.latency_table import load_table
from efficientllm.pruning.costs import TABLE_AXES
from efficientllm.pruning.widths import Widths

SHORT = ("--prompt", "9", "--generate", "4", "--threads", "1", "--device", "cpu")
SETTINGS = Settings(9, 4, (1,), 3, "transformers", "cpu", "float32", 1)
CONFIG = tiny_config("llama-gqa", hidden_size=256, intermediate_size=800, num_attention_heads=8, head_dim=16)


def call(*argv: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in argv])
    return int(stop.value.code or 0)


def test_the_grid_goes_from_the_floors_to_the_source_on_aligned_widths() -> None:
    grid = dict(zip(TABLE_AXES, grid_of(CONFIG), strict=True))
    assert grid["layers"] == (2,)
    assert grid["hidden"] == (16, 136, 256)
    assert grid["kv_heads"] == (1, 2)
    assert grid["queries_per_kv"] == (1, 2, 4)
    assert grid["intermediate"] == (32, 416, 800)
    assert grid_of(CONFIG, 2, depth=True)[0] == (1, 2)


def test_shapes_held_out_lie_within_the_grid_but_not_on_it() -> None:
    grid = grid_of(CONFIG)
    shapes = held_out_shapes(CONFIG, grid, 12)
    assert len(set(shapes)) == 12
    for widths in shapes:
        place = [getattr(widths, axis) for axis in TABLE_AXES]
        assert all(levels[0] <= width <= levels[-1] for width, levels in zip(place, grid, strict=True))
        assert any(width not in levels for width, levels in zip(place, grid, strict=True))


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency here is exactly 1 + hidden / 10 + FFN / 100 times a load that grows from turn to turn."""
    load = [1.0]

    def turn(config: object, widths: Widths, reference: object, settings: Settings) -> tuple[float, float]:
        load[0] *= 1.01
        return (1 + widths.hidden / 10 + widths.intermediate / 100) * load[0], 34.6 * load[0]

    monkeypatch.setattr(table, "_turn", turn)
    grid = grid_of(CONFIG)
    order: list[int] = []

    def tracked(description: str, turns: list[int]) -> AbstractContextManager[list[int]]:
        order.extend(turns)
        return nullcontext(turns)

    monkeypatch.setattr(table, "tracked", tracked)
    content = measure_table(CONFIG, SETTINGS, grid, held_out_shapes(CONFIG, grid, 5))
    measured = math.prod(map(len, grid)) + 5
    assert sorted(order) == sorted(3 * list(range(measured)))
    assert order[::measured] == [0, measured // 3, measured * 2 // 3]  # each repeat begins with another shape
    assert content["seconds"][-1] / content["seconds"][0] == pytest.approx(34.6 / 2.92)
    assert content["worst_error"] == pytest.approx(0.0, abs=1e-9)
    assert content["median_range"] == pytest.approx(0.0, abs=1e-9)


def test_a_table_is_measured_and_a_recipe_names_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"
    options = ("--repeats", "1", "--levels", "2", "--held-out", "2")
    assert call("bench", world.folder / "source", *SHORT, "--table", file, *options) == 0
    assert "Median error on shapes held out: " in capsys.readouterr().out
    content = json.loads(file.read_text())
    about = content["measured_on"]
    assert (about["family"], about["head_dim"], about["vocabulary"]) == ("llama", 6, 300)
    assert (about["dtype"], about["threads"], about["prompt"], about["generate"]) == ("float32", 1, 9, 4)
    loaded = load_table(str(file))
    assert len(loaded.seconds) == 16
    assert loaded.cost()(Widths(2, 40, 4, 2, 52)) > 0
    # Noise may leave a table of so small a model flat, or quite flat, so that no type seems to cost anything.
    prune = {"cost": "latency", "latency_table": str(file), "target": {"latency": "99s"}}
    assert call("plan", world.write("timed", prune=prune | {"floors": {"intermediate": 32}})) == 2
    said = capsys.readouterr().err
    assert "is not below the source's" in said or "leaves nothing to fall that prune.cost latency counts" in said


def test_a_table_that_is_far_off_is_called_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No sum of products of widths: the table's own shapes tell nothing about those between them."""
    draw = random.Random(0)
    monkeypatch.setattr(table, "_turn", lambda *_: (draw.choice([1.0, 3.0]), 1.0))
    argv = ("--table", tmp_path / "t.json", "--repeats", "1", "--levels", "2", "--held-out", "8")
    assert call("bench", world.folder / "source", *SHORT, *argv) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "above 10%: shapes that are nearer to one another than that are not told apart" in said
    assert "measure it again with more --repeats or --levels" in said


def test_a_source_as_narrow_as_the_floors_has_shapes_to_check_too() -> None:
    """No multiple of the alignment lies between its floor and itself."""
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 130}
    config = tiny_config("llama-gqa", hidden_size=130, **heads)
    grid = grid_of(config)
    assert dict(zip(TABLE_AXES, grid, strict=True))["hidden"] == (130,)
    shapes = held_out_shapes(config, grid, 4)
    assert shapes
    assert {widths.hidden for widths in shapes} == {130}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--levels", "1"], "Invalid value for '--levels'"),
        (["--held-out", "0"], "Invalid value for '--held-out'"),
        (["--batch", "1,2"], "--table is of one model's widths and of one --batch: name one of each"),
        (["--json", "b.json"], "--table FILE is itself JSON: leave one out"),
        (["--prompt", "61"], "takes 64 positions at most"),
        (["--table", "no/folder/t.json"], "cannot be written; name a file in a folder that is there"),
        (["--depth"], "--levels, --held-out and --depth are of a table of latencies: add --table FILE"),
        (["SECOND"], "--table is of one model's widths and of one --batch"),
    ],
)
def test_bad_requests(
    world: World, tmp_path: Path, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table_option = () if {"--table", "--depth"} & set(argv) else ("--table", tmp_path / "t.json")
    assert call("bench", world.folder / "source", *SHORT, *table_option, *argv) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
