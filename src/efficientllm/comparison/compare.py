"""The comparison from end to end: tune each arm's rate, run it over the seeds, do that under each budget, report."""

from __future__ import annotations

from efficientllm.comparison.equal_flops import equal_flops
from efficientllm.comparison.forecast import forecast
from efficientllm.comparison.rates import tune_and_run
from efficientllm.comparison.tasks import measure_tasks
from efficientllm.comparison.work import ArmResult, Comparison, Say, summary_of
from efficientllm.errors import UsageError


def run_comparison(comparison: Comparison, say: Say) -> dict[str, dict[str, ArmResult]]:
    """Budget -> arm -> result. Equal tokens come first: they say what each arm costs, which other budgets need.

    An arm that cannot be run is left out with its sentence, the others go on. Raises UsageError where the loop
    itself cannot be run, Interrupted where a signal came.
    """
    loop = ArmResult(comparison.arms[0])
    others = [ArmResult(arm) for arm in comparison.arms[1:]]
    say(forecast(comparison))
    tune_and_run(comparison, [loop], {}, say)
    if loop.problem:
        raise UsageError(f"the loop cannot be run, and all arms are compared with it: {loop.problem}")
    loops = {seed: summary_of(outcome) for seed, outcome in loop.runs.items()}
    tune_and_run(comparison, others, loops, say)
    results = {"tokens": {result.arm.name: result for result in [loop, *others]}}
    for budget in comparison.budgets[1:]:
        results[budget] = equal_flops(comparison, results["tokens"], budget, say)
    if comparison.tasks is not None:
        every = [arm for arms in results.values() for arm in arms.values()]
        measure_tasks(every, comparison.tasks, comparison.recipe.train.device, say)
    return results
