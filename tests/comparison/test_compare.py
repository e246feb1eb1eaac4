"""The command from end to end on a tiny world: arms, seeds, budgets, the page; again without running anything."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import World, tiny_model
from efficientllm.comparison import report, runner, worker
from efficientllm.comparison.arms import parse_arms
from efficientllm.comparison.equal_flops import CLOSE, close
from efficientllm.comparison.forecast import expected_flops
from efficientllm.comparison.work import Comparison
from efficientllm.config import Recipe
from efficientllm.jobs import report as jobs_report
from efficientllm.planning.plan import estimate_of
from processes import call


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers without a process of their own, which would import torch for seconds each; the recipes they ran."""
    ran: list[str] = []

    def work(self: object, argv: Sequence[str], environment: object) -> int:
        ran.append(argv[-1])
        return worker.main(Path(argv[-1]))

    monkeypatch.setattr(runner._Children, "call", work)
    monkeypatch.setattr(runner, "ThreadPoolExecutor", Inline)  # signals of a run want the main thread
    return ran


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither curves nor the report of runs, which take longer than runs of a few steps."""
    monkeypatch.setattr(report, "plot_comparison", lambda *_, **__: None)
    monkeypatch.setattr(report, "write_report", lambda *_, **__: Path("report.html"))


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of runs with the first of its figures alone: drawing all takes longer than the runs."""
    figures = jobs_report.figures
    monkeypatch.setattr(jobs_report, "figures", lambda records: [next(figures(records))])


class Inline:
    def __init__(self, max_workers: int) -> None:
        self.map = map

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_a_comparison_at_equal_tokens_and_flops(world: World, in_process: list[str], one_figure: None) -> None:
    out = world.folder / "comparison"
    tokens = 64 * 64  # steps enough to meet a budget of FLOPs
    train = {"tokens": tokens, "batch_tokens": 64, "micro_batch": 2}
    path = world.write("compared", prune={"correction": "none", "bound": 0.2}, train=train)
    arms = "one-shot:wanda@loop,scratch+distill"
    options = ("--arms", arms, "--seeds", "3,4", "--budget", "flops", "--lr-grid", "2", "--out", out)
    assert call("compare", path, *options) == 0
    results = json.loads((out / "results.json").read_text())
    equal, flops = results["budgets"]["tokens"], results["budgets"]["flops"]
    assert list(equal) == ["loop", *arms.split(",")]
    for arm in equal.values():
        assert {run["tokens"] for run in arm["runs"].values()} == {tokens}
        assert list(arm["losses_by_lr"]) == ["0.02"]
    assert flops["loop"] == equal["loop"]
    for name, arm in list(flops.items())[1:]:
        for seed, run in arm["runs"].items():
            budget = equal["loop"]["runs"][seed]["flops"]
            assert run["budget_spent"] == pytest.approx(run["flops"] / budget)
            assert run["budget_spent"] == pytest.approx(1.0, abs=CLOSE)
            cost = equal[name]["runs"][seed]["flops"]
            assert math.copysign(1, run["tokens"] - tokens) == math.copysign(1, budget - cost) or close(cost, budget)
        assert not arm["problem"]
    shape = {seed: run["widths"] for seed, run in equal["loop"]["runs"].items()}
    for name in arms.split(","):
        assert {seed: run["widths"] for seed, run in equal[name]["runs"].items()} == shape
    for name, arm in equal.items():
        assert (arm["difference"] is None) == (name == "loop")
    assert equal["scratch+distill"]["difference"]["over"] == "seeds"
    assert set(results["structure"]) == {"loop", "one-shot:wanda@loop"}
    page = (out / "comparison.md").read_text()
    assert "| one-shot:wanda@loop |" in page
    assert (out / "curves-flops.svg").stat().st_size > 5_000
    assert "<figure" in (out / "report.html").read_text()
    ran = len(in_process)
    assert call("compare", path, *options) == 0  # finished runs are only read
    assert len(in_process) == ran
    assert json.loads((out / "results.json").read_text()) == results


def test_another_best_rate_of_the_loop_gives_its_followers_runs_of_their_own(
    world: World, in_process: list[str], undrawn: None
) -> None:
    """In one folder, with other rates: the loop's shape, and so the source of scratch, come from another run."""
    out = world.folder / "regridded"
    path = world.write("regridded", prune={"correction": "none"}, train={"tokens": 3 * 256})
    options = ("--arms", "scratch", "--seeds", "1", "--out", out)
    for grid in ("1", "0.3", "1"):
        assert call("compare", path, *options, "--lr-grid", grid) == 0
        arms = json.loads((out / "results.json").read_text())["budgets"]["tokens"]
        assert not arms["scratch"]["problem"]
        assert (grid == "1") == (arms["loop"]["lr"] == 0.01)
    # The first folder is kept for the recipe that began it, and a rate of its own needs none beside it.
    folders = sorted(each.name for each in (out / "tokens" / "scratch").iterdir() if each.is_dir())
    assert folders == ["seed-0-lr-0.003", "seed-0-lr-0.01"]
    config = out / "tokens" / "scratch" / "seed-0-lr-0.01" / "config.yaml"
    config.write_text(config.read_text().replace("seed-0-lr-0.01/model", "seed-0-lr-0.02/model"))
    before = config.read_bytes()
    assert call("compare", path, *options, "--lr-grid", "1") == 0
    assert config.read_bytes() == before
    (beside,) = (out / "tokens" / "scratch").glob("seed-0-lr-0.01-????????")
    ran = len(in_process)
    assert call("compare", path, *options, "--lr-grid", "1") == 0
    assert len(in_process) == ran
    results = json.loads((out / "results.json").read_text())
    assert Path(results["budgets"]["tokens"]["scratch"]["runs"]["0"]["path"]).parent == beside


def test_an_arm_that_fails_leaves_the_others(
    world: World, in_process: list[str], undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world.folder / "failing"
    tiny_model("llama-gqa").save_pretrained(world.folder / "foreign")
    teacher = {"teacher": str(world.folder / "foreign")}
    path = world.write("failing-compared", prune={"correction": "none"}, distill=teacher, train={"tokens": 4 * 256})
    options = ("--seeds", "1", "--lr-grid", "1", "--out", out)
    assert call("compare", path, "--arms", "loop+distill,dense", *options) == 0
    arms = json.loads((out / "results.json").read_text())["budgets"]["tokens"]
    assert "has another vocabulary" in arms["loop+distill"]["problem"]
    assert not arms["loop+distill"]["runs"]
    assert arms["dense"]["difference"]["over"] == "windows"
    assert "No claim about `loop+distill`" in (out / "comparison.md").read_text()


def test_results_are_measured_on_tasks_too(
    world: World, in_process: list[str], undrawn: None, listed_tasks: None, tmp_path: Path
) -> None:
    file = tmp_path / "aps/super_glue/boolq/validation.jsonl"
    file.parent.mkdir(parents=True)
    records = [{"question": f"is it {n}", "passage": "It is.", "idx": n, "label": n % 2} for n in range(6)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = world.folder / "tasked"
    path = world.write("tasked", prune={"correction": "none"}, train={"tokens": 3 * 256})
    options = ["--arms", "dense", "--seeds", "1,2", "--lr-grid", "1", "--out", out]
    assert call("compare", path, *options, "--tasks", "boolq,piqa", "--limit", "4", "--data-dir", tmp_path) == 0
    arms = json.loads((out / "results.json").read_text())["budgets"]["tokens"]
    assert arms["loop"]["tasks"]["boolq"]["difference"] is None
    dense = arms["dense"]["tasks"]["boolq"]
    assert 0 <= dense["mean"] <= 1
    assert dense["difference"]["mean"] == pytest.approx(dense["mean"] - arms["loop"]["tasks"]["boolq"]["mean"])
    page = (out / "comparison.md").read_text()
    assert "| arm | boolq | piqa |" in page
    assert "`dense` is not measured on piqa: " in page  # its records are not there, and all else is kept
    assert dense["difference"] is not None
    assert "piqa" not in arms["dense"]["tasks"]


def test_a_run_has_a_process_of_its_own(world: World, undrawn: None, capfd: pytest.CaptureFixture[str]) -> None:
    path = world.write("alone", prune={"correction": "none"}, train={"tokens": 6 * 256})
    out = world.folder / "alone"
    assert call("compare", path, "--arms", "loop", "--seeds", "1", "--lr-grid", "1", "--out", out) == 0
    assert capfd.readouterr().out.strip() == str(out / "comparison.md")
    run = json.loads((out / "results.json").read_text())["budgets"]["tokens"]["loop"]["runs"]["0"]
    assert run["peak_memory_bytes"] > 10e6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--arms", "lopo"], "'lopo' is no arm"),
        (["--seeds", "1,2,1"], "seed 1 is given twice"),
        (["--seeds", "x"], "neither a count"),
        (["--budget", "hours"], "'hours' is no budget"),
        (["--budget", "pipeline"], "give --source-tokens"),
        (["--lr-grid", "1,a"], "'a' is no number"),
        (["--lr-grid", "1,-1"], "positive multiples"),
        (["--tasks", "boolq", "--data-dir", "nowhere"], "--data-dir nowhere is no folder"),
    ],
)
def test_bad_requests_are_refused_at_once(
    world: World, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("compare", world.write("refused"), *options) == 2
    assert sentence in capsys.readouterr().err


def test_a_dry_run_says_what_lies_ahead(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = world.write("dry"), world.folder / "dry"
    options = ("--arms", "one-shot,scratch,dense", "--budget", "flops", "--out", out, "--dry-run")
    assert call("compare", path, *options) == 0
    said = capsys.readouterr().out
    assert "equal tokens: 20 runs of 6.144K tokens (3 rates and 2 more seeds of 4 arms), 122.9K in all" in said
    assert "budget flops: 9 to 27 runs" in said
    assert not out.exists()
    recipe = Recipe.model_validate(world.recipe("dry"))
    made = Comparison.of(
        recipe, parse_arms(["loop+uncorrected", "one-shot", "scratch", "dense", "fixed"]), [0], ["tokens"], [1.0], out
    )
    default, loop, one_shot, scratch, dense, fixed = (expected_flops(made, arm) for arm in made.arms)
    assert default == estimate_of(made.plan, bf16=False).flops  # what `efficientllm plan` says
    assert scratch < loop < dense
    assert scratch < one_shot < loop  # its looks at rest are of 8 batches, beside 24 that train half of the parameters
    assert scratch < fixed < dense


def test_runs_side_by_side_only_where_each_has_a_gpu(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for device, devices in (("auto", 4), ("cuda", 4), ("cpu", 0), ("cuda:1", 0)):
        recipe = Recipe.model_validate(world.recipe("devices", train={"device": device}))
        made = Comparison.of(recipe, parse_arms(["dense"]), [0], ["tokens"], [1.0], world.folder)
        assert made.devices == devices


def test_the_help_shows_a_whole_arm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")  # with both given, rich asks no terminal, which may be a dumb one of 80 columns
    assert call("compare", "--help") == 0
    assert "[@loop]" in capsys.readouterr().out
