"""Zero-shot evaluation by lm-evaluation-harness, one task after another, several models on the same requests."""

from __future__ import annotations

import difflib
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.errors import UsageError
from efficientllm.evaluation.offline import check_folder, local_data
from efficientllm.evaluation.records import drawn, right_records
from efficientllm.evaluation.tasks import TASKS, common_sense_mean
from efficientllm.reporting.evaluation_table import BY_TASK, accuracy, figures_of, known_results

Say = Callable[[str], None]
# The harness finds the largest batch by five passes over 64 of the longest requests, for every task. That takes a CPU
# longer than the task itself, and more rows at once are no faster there.
CPU_ROWS = 8


@dataclass(frozen=True)
class EvalRequest:
    """tasks: harness names, groups too. limit: the first records of a task (of each subtask); sample: so many drawn
    from all of them, the same for every model. batch_size: a number or auto, which a CPU takes as 8."""

    tasks: Sequence[str] = tuple(TASKS)
    limit: int | None = None
    batch_size: int | str = "auto"
    data_dir: Path | None = None
    sample: int | None = None


def check_tasks(request: EvalRequest) -> Any:
    """The harness's task manager. Raises UsageError for a task that it does not have, naming the nearest, and for a
    folder of local records that is none."""
    check_folder(request.data_dir)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError('evaluation needs lm-evaluation-harness: pip install "efficientllm[eval]"') from error
    manager = TaskManager()
    for task in request.tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, [*TASKS, *manager.all_tasks], n=1, cutoff=0.0)[0]
            raise UsageError(f"'{task}' is no task of lm-evaluation-harness: did you mean {near}?")
    return manager


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: EvalRequest, manager: Any, say: Say
) -> dict[str, Any]:
    """results: task -> {"acc,none": ..., "acc_norm,none": ..., standard errors}, as the harness writes them.
    problems: task -> why it was left out. versions: of harness and tasks. right: task -> subtask -> record -> 0 or 1,
    by the metric that `accuracy` shows."""
    from lm_eval.models.huggingface import HFLM

    quiet = logging.getLogger("lm_eval")
    quiet.setLevel(logging.ERROR)
    rows = CPU_ROWS if request.batch_size == "auto" and model.device.type == "cpu" else request.batch_size
    limits: dict[str, Any] = {"batch_size": rows, "device": str(model.device)}
    with redirect_stdout(sys.stderr):
        runner = HFLM(pretrained=model, tokenizer=tokenizer, **limits)
    found: dict[str, Any] = {"results": {}, "problems": {}, "versions": {}, "records": {}, "right": {}}
    found |= way_of(request)
    with local_data(request.data_dir) as read:
        for task in request.tasks:
            read.clear()
            try:
                output = _evaluate_task(runner, task, request, manager)
                found["results"][task] = _figures(output, task)
            except Exception as error:  # the harness raises whatever a record or a task leads it to; the others go on
                found["problems"][task] = _sentence(error, request, read)
                say(f"{task} is left out: {found['problems'][task]}")
                continue
            found["versions"][task] = output["versions"].get(task)
            found["records"][task] = sum(
                count["effective"] for name, count in output["n-samples"].items() if _belongs(name, task, output)
            )
            found["right"][task] = right_records(output, accuracy(found["results"][task]).metric)
            say(f"{task}: {found['records'][task]:,} records, {accuracy(found['results'][task])}")
    found["mean"] = _mean(found["results"])
    return found


def _evaluate_task(runner: Any, task: str, request: EvalRequest, manager: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    try:
        with torch.no_grad(), redirect_stdout(sys.stderr):  # the harness prints; stdout is for results
            output: dict[str, Any] = simple_evaluate(
                model=runner,
                tasks=[task],
                num_fewshot=0,
                limit=request.limit,
                samples=None if request.sample is None else drawn(task, request.sample, manager),
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=1000,
            )
    except AssertionError as error:
        if traceback.extract_tb(error.__traceback__)[-1].name != "_loglikelihood_tokens":
            raise
        raise UsageError(
            f"one of its answers is longer than the model's {runner.max_length:,} positions, which the harness refuses"
        ) from error
    return output


def _belongs(name: str, task: str, output: dict[str, Any]) -> bool:
    """Whether a leaf task is (part of) the one asked for: each call asks for one, so all of its leaves are."""
    return name == task or name not in output.get("group_subtasks", {}) or not output["group_subtasks"][name]


def _figures(output: Mapping[str, Any], task: str) -> dict[str, float]:
    """Metrics of the task itself. Raises UsageError for a mere list of tasks, which has none of its own."""
    values = output["results"].get(task, {})
    figures = {key: float(value) for key, value in values.items() if isinstance(value, int | float) and "," in key}
    if not figures_of(figures):
        inside = ", ".join(list(output["results"])[:5])
        raise UsageError(f"it has no figure of its own; name the tasks in it one by one ({inside})")
    return figures


def _mean(results: Mapping[str, dict[str, float]]) -> float | None:
    return common_sense_mean({task: accuracy(values).value for task, values in results.items()})


def joined_with(known: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Results with those of other tasks that were measured before in the same way: limit or sample, data, harness."""
    if not same_way(known, found):
        return found
    joined = found | {key: {**known.get(key, {}), **found.get(key, {})} for key in BY_TASK}
    return joined | {"mean": _mean(joined["results"])}


def results_file(home: Path, request: EvalRequest) -> Path:
    """HOME/eval/results.json; for a part of a task's records alone, a file of their own where the other is there and
    holds figures over all records, which took longer."""
    file = home / "eval" / "results.json"
    known = known_results(file)
    part = {"limit": request.limit, "sample": request.sample}
    named = next(((key, number) for key, number in part.items() if number is not None), None)
    if named is None or not known.get("results") or any(known.get(key) is not None for key in part):
        return file
    return file.with_name("results-{}-{}.json".format(*named))


def same_way(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of results may stand in one table."""
    return all(one.get(key) == other.get(key) for key in ("limit", "sample", "data", "harness", "num_fewshot"))


def way_of(request: EvalRequest) -> dict[str, Any]:
    """What makes results comparable."""
    data = "local" if request.data_dir else "hub"
    part = {"limit": request.limit, "sample": request.sample}
    return {"harness": version("lm_eval"), **part, "data": data, "num_fewshot": 0}


def _sentence(error: Exception, request: EvalRequest, read: Sequence[Path]) -> str:
    """read: the files of local records that the task was made from."""
    if isinstance(error, UsageError):
        return str(error)
    first = str(error).strip().split("\n")[0][:200] or "no word of why"
    if not isinstance(error, OSError):
        why = f"the harness stops at it with {type(error).__name__}: {first}"
        if not read:
            return f"{why}; leave the task out, or try a smaller --batch-size if it is the memory"
        files = list(dict.fromkeys(read))
        where = str(files[0]) if len(files) == 1 else f"its {len(files)} files under {request.data_dir}"
        return f"{why}; see whether every record of {where} has the hub's fields, or leave the task out"
    return f"its data cannot be had ({first}); give --data-dir with local records, or leave the task out"
