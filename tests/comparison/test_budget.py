"""Equal FLOPs: the line that leads to the tokens, and the search that ends within 2 % or says why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from efficientllm.comparison import equal_flops
from efficientllm.comparison.arms import parse_arm
from efficientllm.comparison.equal_flops import CLOSE, Search, solved_tokens, tail_cost
from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.work import ArmResult, Work


def test_tail_of_a_run_of_one_step() -> None:
    assert tail_cost([{"flops": 600, "tokens": 200}]) == 3.0
    assert tail_cost([{"flops": 900, "tokens": 100}, {"flops": 1100, "tokens": 200}]) == 2.0


def test_the_first_guess_leaves_the_cost_of_pruning_alone() -> None:
    tried = [(1000, 5000.0)]  # 3,000 of pruning and 2 a token
    assert solved_tokens(tried, 2.0, 4000.0, 10) == 500
    assert solved_tokens(tried, 2.0, 2900.0, 10) <= 0


def test_further_guesses_follow_the_runs() -> None:
    tried = [(1000, 5000.0), (500, 3500.0)]  # in truth 2,000 of pruning and 3 a token, for some of it goes with them
    assert solved_tokens(tried, 2.0, 3200.0, 10) == 400
    assert solved_tokens([(500, 4000.0), (1000, 3900.0)], 2.0, 4100.0, 10) == 1100  # a falling line is noise


def outcome(folder: Path, tokens: int, fixed: float, share: float) -> Outcome:
    """A run that costs `fixed` and 2 FLOPs a token, and `share` a token more over its first half."""
    folder = folder / str(tokens)
    folder.mkdir(parents=True)
    flops = [fixed + 2 * at + share * min(at, tokens / 2) for at in range(10, tokens + 1, 10)]
    lines = [{"tokens": 10 * (index + 1), "flops": cost} for index, cost in enumerate(flops)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"path": str(folder / "model"), "validation_loss": 1.0}
    return Outcome({"tokens": tokens, "flops": flops[-1], "result": result}, {"losses": [1.0]})


@pytest.mark.parametrize(("fixed", "share"), [(0.0, 0.0), (3000.0, 0.0), (3000.0, 3.0), (0.0, 6.0)])
def test_the_search_meets_its_budget(tmp_path: Path, fixed: float, share: float) -> None:
    search = Search(ArmResult(parse_arm("loop")), 0, 4000.0, [outcome(tmp_path, 1000, fixed, share)])
    while (tokens := search.next_tokens(10)) is not None:
        search.tried.append(outcome(tmp_path, tokens, fixed, share))
    assert search.problem() is None
    assert search.nearest.summary is not None
    assert search.nearest.summary["flops"] == pytest.approx(4000, rel=CLOSE)
    assert len(search.tried) <= 3


def test_what_cannot_meet_a_budget_says_so(tmp_path: Path) -> None:
    dear = Search(ArmResult(parse_arm("loop")), 3, 2000.0, [outcome(tmp_path, 1000, 3000.0, 0.0)])
    while (tokens := dear.next_tokens(10)) is not None:
        dear.tried.append(outcome(tmp_path, tokens, 3000.0, 0.0))
    assert dear.problem() == (
        "seed 3: cannot meet 2e+03 FLOPs within 2%: pruning alone costs about 3e+03, and runs of 1K, 400 tokens spent "
        "2.500, 1.900 of it; raise train.tokens"
    )
    coarse = Search(ArmResult(parse_arm("dense")), 0, 1500.0, [outcome(tmp_path, 990, 0.0, 0.0)])
    while (tokens := coarse.next_tokens(330)) is not None:
        coarse.tried.append(outcome(tmp_path, tokens, 0.0, 0.0))
    assert "pruning alone costs about 0, and runs of 990, 660 tokens spent 1.320, 0.880 of it" in str(coarse.problem())


def test_the_pipeline_charges_the_source_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch may spend what the source cost; scratch taught by the source may not, for it stands on it as the loop."""
    runs = {name: outcome(tmp_path / name, 1000, 0.0, 0.0) for name in ("loop", "scratch", "scratch+distill", "dense")}
    equal = {name: ArmResult(parse_arm(name), rate=1e-3, runs={0: run}) for name, run in runs.items()}

    def run_work(comparison: object, work: Sequence[Work], *rest: object) -> list[Outcome]:
        return [outcome(tmp_path / result.arm.name, tokens, 0.0, 0.0) for result, _, _, tokens in work]

    monkeypatch.setattr(equal_flops, "run_work", run_work)
    comparison = SimpleNamespace(plan=SimpleNamespace(batch_tokens=10), source_flops=lambda: 6000)
    found = equal_flops.equal_flops(comparison, equal, "pipeline", print)  # type: ignore[arg-type]
    assert list(found) == ["loop", "scratch", "scratch+distill"]
    tokens = {name: [run.summary["tokens"] for run in arm.runs.values() if run.summary] for name, arm in found.items()}
    assert tokens == {"loop": [1000], "scratch": [4000], "scratch+distill": [1000]}
    assert [arm.inherited for arm in found.values()] == [6000, 0, 6000]
    assert not equal["loop"].inherited
