"""From runs to figures: results.json, everything that the page and the plots show."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from efficientllm import __version__
from efficientllm.comparison.rates import reported_windows
from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.statistics import Interval, between_groups, over_seeds, over_windows, surviving
from efficientllm.comparison.structure import kept_units, overlaps
from efficientllm.comparison.tasks import task_accuracy
from efficientllm.comparison.work import ArmResult, Comparison, summary_of
from efficientllm.config import dump_recipe
from efficientllm.errors import UsageError
from efficientllm.evaluation.harness import EvalRequest
from efficientllm.pruning.widths import Widths
from efficientllm.reporting.journal import read_journal

LN2 = math.log(2)


def collect(comparison: Comparison, results: Mapping[str, Mapping[str, ArmResult]]) -> dict[str, Any]:
    """One JSON object: settings, source, budget -> arm -> figures, structure of the loops."""
    loop = results["tokens"]["loop"]
    source = summary_of(next(iter(loop.runs.values())))
    check_same_text([run for arms in results.values() for arm in arms.values() for run in arm.runs.values()])
    return {
        "settings": {
            "recipe": dump_recipe(comparison.recipe),
            "arms": [arm.name for arm in comparison.arms],
            "seeds": list(comparison.seeds),
            "budgets": list(comparison.budgets),
            "lr_grid": list(comparison.grid),
            "efficientllm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "source": source["source"],
        "budgets": {
            budget: with_survivors(
                {name: arm_figures(arm, arms["loop"], comparison.tasks) for name, arm in arms.items()}
            )
            for budget, arms in results.items()
        },
        "structure": {
            name: figures
            for name, arm in results["tokens"].items()
            if arm.arm.prunes and len(arm.runs) > 1 and (figures := structure(arm))
        },
    }


def check_same_text(outcomes: Sequence[Outcome]) -> None:
    """Raises UsageError naming a run that was measured on other text, or more of it, than the first."""
    kinds = []
    for outcome in outcomes:
        assert outcome.windows is not None
        summary = summary_of(outcome)
        kinds.append((summary["source"]["corpora"], len(outcome.windows["losses"])))
        if kinds[-1] != kinds[0]:
            folder = Path(summary["result"]["path"]).parent
            raise UsageError(
                f"{folder} was trained or measured on other text than the rest of the comparison; delete it, and the "
                "same command runs it anew"
            )


def arm_figures(result: ArmResult, loop: ArmResult, request: EvalRequest | None = None) -> dict[str, Any]:
    """All seeds of one arm under one budget; the difference to the loop is left out where it has no interval, and
    where something went wrong with the arm, a seed that diverged or a budget that it could not meet."""
    runs = {
        seed: run_figures(outcome) | {"budget_spent": spent(result, seed)}
        for seed, outcome in sorted(result.runs.items())
    }
    reference = None if result is loop or result.problem else loop
    difference = None if reference is None else difference_to(result, reference)
    return {
        "lr": result.rate,
        "losses_by_lr": {f"{lr:g}": loss for lr, loss in result.rates.items()},
        "problem": result.problem,
        "runs": runs,
        "tasks": _tasks(result, reference, request) if request else {},
        "task_problems": dict(result.task_problems),
        "inherited_flops": result.inherited,
        "mean": {
            name: _mean(runs.values(), name) for name in ("loss", "bits_per_byte", "perplexity", "flops", "tokens")
        },
        "spread": _spread([run["loss"] for run in runs.values()]),
        "difference": None if difference is None else _figures(difference),
    }


def _figures(interval: Interval) -> dict[str, Any]:
    return asdict(interval) | {"resolved": interval.resolved}


def with_survivors(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Notes in each difference of loss whether it holds when all of the budget are tested together."""
    found = surviving({name: arm["difference"]["p"] for name, arm in arms.items() if arm["difference"]})
    for name, arm in arms.items():
        if arm["difference"]:
            arm["difference"]["survives"] = name in found
    return arms


def _tasks(result: ArmResult, reference: ArmResult | None, request: EvalRequest) -> dict[str, Any]:
    """Of the tasks that are measured with every seed; reference: the loop, where there may be a difference to it."""
    found = {}
    for task in request.tasks:
        own = _task(result, task, request)
        if own:
            difference = None if reference is None else _task_difference(own, _task(reference, task, request))
            found[task] = {"mean": statistics.fmean(own.values()), "difference": difference}
    return found


def _task(result: ArmResult, task: str, request: EvalRequest) -> dict[int, float]:
    """By seed; nothing where one seed is not measured: a mean over fewer seeds compares with no other arm."""
    found = {seed: task_accuracy(outcome, task, request) for seed, outcome in result.runs.items()}
    return {seed: value for seed, value in found.items() if value is not None} if None not in found.values() else {}


def _task_difference(own: dict[int, float], loop: dict[int, float]) -> dict[str, Any] | None:
    """Accuracy minus the loop's, paired by seed; None for fewer than two seeds, which give no interval."""
    seeds = sorted(own.keys() & loop.keys())
    if len(seeds) < 2:
        return None
    return _figures(over_seeds([own[seed] for seed in seeds], [loop[seed] for seed in seeds]))


def spent(result: ArmResult, seed: int) -> float | None:
    """FLOPs of a run as a share of its budget; None at equal tokens, where there is none."""
    return summary_of(result.runs[seed])["flops"] / result.allowed[seed] if seed in result.allowed else None


def run_figures(outcome: Outcome) -> dict[str, Any]:
    """loss: nats per token, mean over the windows that no rate was chosen on. bits_per_byte: the loss of a token of
    theirs, by the bytes that a token of all windows has."""
    summary, windows = summary_of(outcome), outcome.windows
    assert windows is not None
    losses = reported_windows(outcome)
    loss = statistics.fmean(losses)
    counts = windows["tokens"]  # of each window; in files of older runs one number, for all alike
    counts = [counts] * len(windows["losses"]) if isinstance(counts, int) else counts
    of_a_token = statistics.fmean(losses, counts[1::2] or counts)
    return {
        "loss": loss,
        "bits_per_byte": of_a_token / LN2 * sum(counts) / windows["bytes"],
        "perplexity": math.exp(min(loss, 700.0)),
        "parameters": summary["result"]["parameters"],
        "widths": summary["result"]["widths"],
        "tokens": summary["tokens"],
        "flops": summary["flops"],
        "seconds": summary["seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "path": summary["result"]["path"],
    }


def difference_to(result: ArmResult, loop: ArmResult) -> Interval | None:
    """Loss minus the loop's, paired by seed; with one seed, paired by validation window; None without a pair."""
    seeds = sorted(result.runs.keys() & loop.runs.keys())
    pairs = [(reported_windows(result.runs[seed]), reported_windows(loop.runs[seed])) for seed in seeds]
    if not pairs:
        return None
    if len(pairs) == 1:
        return over_windows(*pairs[0])
    own, other = zip(*((statistics.fmean(a), statistics.fmean(b)) for a, b in pairs), strict=True)
    return over_seeds(own, other)


def structure(result: ArmResult) -> dict[str, Any]:
    """overlap: of the units that each seed kept, by type. spread: widest minus narrowest over seeds, by width.
    shapes: whether seeds of different shapes differ in loss, None where no two shapes have two seeds each."""
    kept, source, widths = [], None, []
    shapes: dict[tuple[int, ...], list[float]] = {}
    for outcome in result.runs.values():
        summary = summary_of(outcome)
        folder = Path(summary["result"]["path"]).parent
        source = Widths(**summary["source"]["widths"])
        journals = (read_journal(folder / f"{name}.jsonl") for name in ("events", "compactions"))
        kept.append(kept_units(source, *journals))
        widths.append(summary["result"]["widths"])
        shapes.setdefault(tuple(widths[-1].values()), []).append(statistics.fmean(reported_windows(outcome)))
    assert source is not None
    spread = {name: max(each[name] for each in widths) - min(each[name] for each in widths) for name in widths[0]}
    return {
        "overlap": {name: asdict(overlap) for name, overlap in overlaps(kept, source).items()},
        "spread": spread,
        "shapes": _between_shapes(list(shapes.values())),
    }


def _between_shapes(groups: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Difference in loss between the two shapes with the most seeds."""
    one, other = sorted([*groups, [], []], key=len, reverse=True)[:2]
    if len(other) < 2:
        return None
    return _figures(between_groups(one, other))


def _mean(runs: Any, name: str) -> float | None:
    values = [run[name] for run in runs]
    return statistics.fmean(values) if values else None


def _spread(losses: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds."""
    return statistics.stdev(losses) if len(losses) > 1 else None
