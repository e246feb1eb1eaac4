"""Equal FLOPs: the line that leads to the tokens, and the search that ends within 2 % or says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficientllm.comparison.arms import parse_arm
from efficientllm.comparison.budget import CLOSE, fixed_cost, solved_tokens, tail_cost
from efficientllm.comparison.equal_flops import Search
from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.work import ArmResult


def test_tail_of_a_run_of_one_step() -> None:
    assert tail_cost([{"flops": 600, "tokens": 200}]) == 3.0
    assert tail_cost([{"flops": 900, "tokens": 100}, {"flops": 1100, "tokens": 200}]) == 2.0


def test_the_first_guess_leaves_the_cost_of_pruning_alone() -> None:
    tried = [(1000, 5000.0)]  # 3,000 of pruning and 2 a token
    assert fixed_cost(tried, 2.0) == 3000
    assert solved_tokens(tried, 2.0, 4000.0, 10) == 500
    assert solved_tokens(tried, 2.0, 2900.0, 10) <= 0


def test_further_guesses_follow_the_runs() -> None:
    tried = [(1000, 5000.0), (500, 3500.0)]  # in truth 2,000 of pruning and 3 a token, for some of it goes with them
    assert fixed_cost(tried, 2.0) == 2000
    assert solved_tokens(tried, 2.0, 3200.0, 10) == 400
    assert solved_tokens([(500, 4000.0), (1000, 3900.0)], 2.0, 4100.0, 10) == 1100  # a falling line is noise


def outcome(folder: Path, tokens: int, fixed: float, share: float) -> Outcome:
    """A run that costs `fixed` and 2 FLOPs a token, and `share` a token more over its first half."""
    folder = folder / str(tokens)
    folder.mkdir()
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
    assert search.problem(10) is None
    assert search.nearest.summary is not None
    assert search.nearest.summary["flops"] == pytest.approx(4000, rel=CLOSE)
    assert len(search.tried) <= 3


def test_what_cannot_meet_a_budget_says_so(tmp_path: Path) -> None:
    dear = Search(ArmResult(parse_arm("loop")), 3, 2000.0, [outcome(tmp_path, 1000, 3000.0, 0.0)])
    while (tokens := dear.next_tokens(10)) is not None:
        dear.tried.append(outcome(tmp_path, tokens, 3000.0, 0.0))
    assert dear.problem(10) == "seed 3: cannot meet 2e+03 FLOPs: pruning alone costs 3e+03; raise train.tokens"
    coarse = Search(ArmResult(parse_arm("dense")), 0, 1500.0, [outcome(tmp_path, 990, 0.0, 0.0)])
    while (tokens := coarse.next_tokens(330)) is not None:
        coarse.tried.append(outcome(tmp_path, tokens, 0.0, 0.0))
    assert "within 2%: pruning alone costs 0, a batch 660, and the nearest run spent 0.88" in str(coarse.problem(330))
