"""Equal FLOPs: each arm on as many tokens as its seed's budget pays for, found by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.work import ArmResult, Comparison, Say, run_work, summary_of
from efficientllm.reporting.journal import read_journal
from efficientllm.sizes import format_count

CLOSE = 0.02  # of the budget: an arm that spent nearer to it than this has met it
TRIES = 3  # runs of an arm and seed towards a budget, beside the one at equal tokens


def solved_tokens(tried: Sequence[tuple[int, float]], tail: float, budget: float, batch: int) -> int:
    """Tokens, to the nearest whole batch, at which a straight line through the costs meets the budget; less than a
    batch where it lies above the budget from the start.

    tried: (tokens, FLOPs) of the runs so far. The line goes through the last two of them (the secant method), and with
    the first alone rises by `tail` FLOPs a token: refreshed scores and correction cost nearly as much in a short run as
    in a long one, so what pruning has cost stays and only the rest goes with the tokens.
    """
    tokens, flops = tried[-1]
    return round((tokens + (budget - flops) / _slope(tried, tail)) / batch) * batch


def _slope(tried: Sequence[tuple[int, float]], tail: float) -> float:
    if len(tried) < 2 or tried[-1][0] == tried[-2][0]:
        return tail
    (earlier, less), (later, more) = tried[-2:]
    # A token costs at least what one after pruning does. A flatter line means that the shorter run looked at the
    # gradient once more than the longer one, which says nothing of the cost of a token.
    return max(tail, (more - less) / (later - earlier))


def tail_cost(metrics: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs a token over the last tenth of a run, at least one step, all of a run of one step: of metrics.jsonl."""
    last = metrics[-1]
    first = {"flops": 0, "tokens": 0} if len(metrics) == 1 else metrics[-1 - max(1, len(metrics) // 10)]
    return float((last["flops"] - first["flops"]) / (last["tokens"] - first["tokens"]))


def close(spent: float, budget: float) -> bool:
    return abs(spent / budget - 1.0) <= CLOSE


@dataclass
class Search:
    """The runs of one arm and seed towards a budget, that at equal tokens first."""

    result: ArmResult
    seed: int
    budget: float
    tried: list[Outcome]
    ended: bool = False

    @property
    def nearest(self) -> Outcome:
        return min(self.tried, key=lambda outcome: abs(summary_of(outcome)["flops"] / self.budget - 1))

    @property
    def met(self) -> bool:
        return close(summary_of(self.nearest)["flops"], self.budget)

    def next_tokens(self, batch: int) -> int | None:
        """Tokens of the next run; None where the budget is met, cannot be, or enough has been tried."""
        if self.ended or self.met or len(self.tried) > TRIES:
            return None
        tokens = solved_tokens(self._costs(), self._tail, self.budget, batch)
        first = self._costs()[0]
        if tokens < batch and len(self.tried) == 1:
            # Pruning costs less in a shorter run, by how much one run does not tell: try a second.
            tokens = max(batch, int(first[0] * self.budget / first[1] / batch) * batch)
        return None if tokens < batch or tokens in dict(self._costs()) else tokens

    def problem(self) -> str | None:
        """Why the budget is not met, in one sentence; None where it is."""
        if self.met:
            return None
        summary, tail = summary_of(self.nearest), self._tail
        pruning = max(0.0, summary["flops"] - tail * summary["tokens"])
        tokens = ", ".join(format_count(each) for each, _ in self._costs())
        shares = ", ".join(f"{flops / self.budget:.3f}" for _, flops in self._costs())
        return (
            f"seed {self.seed}: cannot meet {self.budget:.3g} FLOPs within {CLOSE:.0%}: pruning alone costs about "
            f"{pruning:.3g}, and runs of {tokens} tokens spent {shares} of it; raise train.tokens"
        )

    def _costs(self) -> list[tuple[int, float]]:
        return [(summary["tokens"], float(summary["flops"])) for summary in map(summary_of, self.tried)]

    @cached_property
    def _tail(self) -> float:
        """Of the first run, at equal tokens."""
        return tail_cost(read_journal(Path(summary_of(self.tried[0])["result"]["path"]).parent / "metrics.jsonl"))


def equal_flops(comparison: Comparison, equal: Mapping[str, ArmResult], budget: str, say: Say) -> dict[str, ArmResult]:
    """Arms again, at the rates found for equal tokens, within CLOSE of what the loop of each seed has spent.

    Under `pipeline` only scratch arms run, with what the source's own pretraining cost on top; not where the source
    teaches, for then it had to be trained for that arm as well. An arm that cannot meet the budget keeps its nearest
    run, with its sentence.
    """
    source = comparison.source_flops() if budget == "pipeline" else 0
    loop = replace(equal["loop"], inherited=source)
    loops = {seed: summary_of(outcome) for seed, outcome in loop.runs.items()}
    results = {"loop": loop}
    searches: list[Search] = []
    say(f"budget {budget}: up to {TRIES} runs of each arm and seed, until one is within {CLOSE:.0%} of the FLOPs")
    for name, known in equal.items():
        if name == "loop" or (budget == "pipeline" and known.arm.base != "scratch"):
            continue
        inherited, extra = (source, 0) if known.arm.distilled else (0, source)
        result = results[name] = ArmResult(known.arm, known.rates, known.rate, inherited=inherited)
        if known.problem:
            result.problem = f"at equal tokens, {known.problem}"
            continue
        result.allowed = {seed: float(loops[seed]["flops"]) + extra for seed in known.runs}
        searches += [Search(result, seed, result.allowed[seed], [run]) for seed, run in known.runs.items()]
    _run_searches(comparison, searches, budget, loops, say)
    return results


def _run_searches(
    comparison: Comparison, searches: list[Search], budget: str, loops: Mapping[int, dict[str, object]], say: Say
) -> None:
    batch = comparison.plan.batch_tokens
    while True:
        wanted = [(search, tokens) for search in searches if (tokens := search.next_tokens(batch)) is not None]
        if not wanted:
            break
        work = [(search.result, search.seed, search.result.rate or 0.0, tokens) for search, tokens in wanted]
        for (search, _), outcome in zip(wanted, run_work(comparison, work, budget, loops, say), strict=True):
            if outcome.summary is None:
                search.ended = True
                search.result.keep(search.seed, outcome, say)
            else:
                search.tried.append(outcome)
    for search in searches:
        problem = None if search.ended else search.problem()
        search.result.keep(search.seed, search.nearest, say)
        if problem is not None:
            search.result.fail(problem, say)
