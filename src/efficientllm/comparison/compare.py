"""The comparison from end to end: tune each arm's rate, run it over the seeds, do that under each budget, report."""

from __future__ import annotations

from efficientllm.comparison.equal_flops import equal_flops
from efficientllm.comparison.rates import tune_and_run
from efficientllm.comparison.tasks import measure_tasks
from efficientllm.comparison.work import ArmResult, Comparison, Say, summary_of
from efficientllm.errors import UsageError
from efficientllm.sizes import format_count


def run_comparison(comparison: Comparison, say: Say) -> dict[str, dict[str, ArmResult]]:
    """Budget -> arm -> result. Equal tokens come first: they say what each arm costs, which other budgets need.

    An arm that cannot be run is left out with its sentence, the others go on. Raises UsageError where the loop
    itself cannot be run, Interrupted where a signal came.
    """
    loop = ArmResult(comparison.arms[0])
    others = [ArmResult(arm) for arm in comparison.arms[1:]]
    count = len(comparison.arms) * (len(comparison.grid) + len(comparison.seeds) - 1)
    tokens = format_count(comparison.recipe.train.tokens)
    say(f"equal tokens: {count} runs of {tokens} tokens; finished ones are only read")
    tune_and_run(comparison, [loop], {}, say)
    if loop.problem:
        raise UsageError(f"the loop cannot be run, and all arms are compared with it: {loop.problem}")
    loops = {seed: summary_of(outcome) for seed, outcome in loop.runs.items()}
    tune_and_run(comparison, others, loops, say)
    results = {"tokens": {result.arm.name: result for result in [loop, *others]}}
    for budget in comparison.budgets[1:]:
        results[budget] = equal_flops(comparison, results["tokens"], budget, say)
    if comparison.tasks is not None:
        done = [run for arms in results.values() for arm in arms.values() for run in arm.runs.values()]
        measure_tasks(done, comparison.tasks, comparison.recipe.train.device, say)
    return results
