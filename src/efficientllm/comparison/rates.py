"""The peak learning rate of each arm: the best of a grid, which grows while its best value lies at an edge."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.work import ArmResult, Comparison, Loops, Say, loss_of, run_work

FACTOR = 2.0  # from the edge of the grid to the next value beyond it
MORE = 3  # values beyond each edge at most


def tune_and_run(comparison: Comparison, results: Sequence[ArmResult], loops: Loops, say: Say) -> None:
    """Each arm at every rate with the first seed, then at its best one with the others."""
    first, tokens = comparison.seeds[0], comparison.recipe.train.tokens
    found = _tune(comparison, results, loops, say)
    for result in results:
        mine = found[result.arm.name]
        done = {lr: loss for lr, loss in result.rates.items() if loss is not None}
        if not done:
            problem = next((o.problem for o in mine.values() if o.problem), "its loss diverged at every rate")
            result.fail(problem, say)
            continue
        result.rate = min(done, key=lambda lr: done[lr])
        result.runs[first] = mine[result.rate]
    left = [result for result in results if result.rate is not None]
    work = [(result, seed, result.rate or 0.0, tokens) for result in left for seed in comparison.seeds[1:]]
    for (result, seed, _, _), outcome in zip(work, run_work(comparison, work, "tokens", loops, say), strict=True):
        result.keep(seed, outcome, say)


def _tune(
    comparison: Comparison, results: Sequence[ArmResult], loops: Loops, say: Say
) -> dict[str, dict[float, Outcome]]:
    """Runs of the first seed: arm -> rate -> outcome. Notes every rate's loss in the results."""
    first, train = comparison.seeds[0], comparison.recipe.train
    grid = [scale * train.lr for scale in comparison.grid]
    found: dict[str, dict[float, Outcome]] = {result.arm.name: {} for result in results}
    work = [(result, first, lr, train.tokens) for result in results for lr in grid]
    while work:
        for (result, _, lr, _), outcome in zip(work, run_work(comparison, work, "tokens", loops, say), strict=True):
            found[result.arm.name][lr] = outcome
            result.rates[lr] = tuning_loss(outcome)
        further = [(result, next_rate(result.rates, grid)) for result in results]
        work = [(result, first, lr, train.tokens) for result, lr in further if lr is not None]
    return found


def next_rate(rates: Mapping[float, float | None], grid: Sequence[float]) -> float | None:
    """The rate to try next, beyond the edge at which the best one lies; None where it lies within, or that edge has
    been moved often enough, or the grid is one rate, which was then chosen on purpose."""
    done = {lr: loss for lr, loss in rates.items() if loss is not None}
    if len(grid) < 2 or not done:
        return None
    best = min(done, key=lambda lr: done[lr])
    room = FACTOR**MORE * (1 - 1e-9)  # rounding must not add one more step beyond MORE
    if best == max(rates) and best < max(grid) * room:
        return best * FACTOR
    if best == min(rates) and best > min(grid) / room:
        return best / FACTOR
    return None


def tuning_loss(outcome: Outcome) -> float | None:
    """Mean loss over every other window from the first on; None where the run failed or diverged.

    Rates are chosen on these windows and arms compared on the others, so that a rate which happens to suit the
    windows gains nothing by it.
    """
    if loss_of(outcome) is None or outcome.windows is None:
        return None
    return statistics.fmean(outcome.windows["losses"][::2])


def reported_windows(outcome: Outcome) -> list[float]:
    """Losses of the windows that no rate was chosen on; of the only one where there is no other."""
    assert outcome.windows is not None
    losses: list[float] = outcome.windows["losses"]
    return losses[1::2] or losses
