"""What the page claims, and of what: intervals beside claims, rates at an edge, budgets that were not met."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import tiny_model
from data.corpus_samples import LENGTH, STORIES, small_tokenizer, stream_of
from efficientllm.comparison import worker
from efficientllm.comparison.arms import parse_arm
from efficientllm.comparison.page import _problems, _rates, _reach, _structure, _table, _verdict, at_edge
from efficientllm.comparison.results import _between_shapes, arm_figures, check_same_text, run_figures
from efficientllm.comparison.runner import Outcome
from efficientllm.comparison.tasks import task_accuracy
from efficientllm.comparison.work import ArmResult
from efficientllm.data.planes import Planes, with_planes
from efficientllm.data.rows import CONTEXT
from efficientllm.errors import UsageError
from efficientllm.evaluation.harness import EvalRequest
from efficientllm.training.gradient import Precision, row_losses


def arm(mean: float, half: float, *, over: str = "seeds", lr: float = 2e-3) -> dict[str, object]:
    low, high = mean - half, mean + half
    difference = {"mean": mean, "low": low, "high": high, "over": over, "resolved": low > 0 or high < 0}
    difference["survives"] = mean < 0
    return {"difference": difference, "lr": lr, "losses_by_lr": {"0.001": 3.0, "0.002": 2.0, "0.004": 2.5}}


def test_every_claim_has_its_interval_and_its_basis() -> None:
    lines = list(_verdict({"good": arm(-0.2, 0.1), "bad": arm(0.3, 0.1, over="windows"), "same": arm(0.01, 0.1)}))
    together = "after correction for 3 comparisons"
    assert lines[0] == f"* Better than the loop: `good` **-0.2000 (-0.3000 to -0.1000)**; holds {together}."
    assert lines[1].endswith(f"; does not hold {together}.")
    assert "correction" not in lines[2]
    assert "`bad` **+0.3000 (+0.2000 to +0.4000)**, over windows of one seed" in lines[1]
    assert "`same` +0.0100 (-0.0900 to +0.1100)" in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize(("lr", "edge"), [(1e-3, True), (2e-3, False), (4e-3, True)])
def test_a_rate_at_the_edge_is_said_in_the_claim(lr: float, edge: bool) -> None:
    assert at_edge(arm(0.0, 0.1, lr=lr)) == edge
    (line,) = _verdict({"it": arm(0.0, 0.1, lr=lr)})
    assert ("; `it` best at the edge of the tried rates" in line) == edge


def test_a_loop_at_the_edge_weakens_every_claim() -> None:
    loop = arm(0.0, 0.1, lr=4e-3) | {"difference": None}
    lines = list(_verdict({"loop": loop, "it": arm(0.3, 0.1), "that": arm(0.3, 0.1, lr=1e-3)}))
    assert "; `loop` best at the edge" in lines[0]
    assert "; `that` and `loop` best at the edge" in lines[1]


def test_sensitivity_to_the_rate_is_a_table() -> None:
    failed = arm(0.0, 0.1) | {"losses_by_lr": {"0.002": 2.5, "0.008": None}}
    (table,) = _rates({"loop": arm(0.0, 0.1), "it": failed})
    lines = table.splitlines()
    assert lines[0] == "| arm | 0.001 | 0.002 | 0.004 | 0.008 |"
    assert lines[2:] == ["| loop | 3.0000 | **2.0000** | 2.5000 | - |", "| it | - | **2.5000** | - | failed |"]


@pytest.mark.parametrize("shares", [(None, None), (0.99, 1.39)])
def test_what_was_spent_of_a_budget_is_a_column(shares: tuple[float | None, float | None]) -> None:
    names = ("loss", "bits_per_byte", "perplexity", "flops", "tokens")
    run = {"parameters": 10, "seconds": 1.0, "peak_memory_bytes": 2**20}
    runs = {seed: run | {"budget_spent": share} for seed, share in enumerate(shares)}
    figures = {
        "lr": 2e-3,
        "inherited_flops": 5,
        "spread": None,
        "difference": None,
        "mean": dict.fromkeys(names, 1.0),
        "runs": runs,
    }
    (table,) = _table({"it": figures})
    header, _, row = table.splitlines()
    assert ("| FLOPs / budget |" in header) == ("| 0.990 to 1.390 |" in row) == (shares[0] is not None)
    assert "| 1 + 5 |" in row


def test_runs_on_other_text_are_refused() -> None:
    def outcome(corpora: str, windows: int) -> SimpleNamespace:
        summary = {"source": {"corpora": [corpora]}, "result": {"path": "runs/odd/model"}}
        return SimpleNamespace(summary=summary, windows={"losses": [1.0] * windows})

    check_same_text([outcome("books", 3), outcome("books", 3)])  # type: ignore[list-item]
    for other in (outcome("books", 4), outcome("code", 3)):
        with pytest.raises(UsageError, match="runs/odd was trained or measured on other text"):
            check_same_text([outcome("books", 3), other])  # type: ignore[list-item]


def test_an_arm_with_a_seed_that_diverged_claims_nothing() -> None:
    summary = {"result": {"parameters": 1, "widths": {}, "path": "", "validation_loss": 1.0}, "tokens": 1, "flops": 1}
    summary |= {"seconds": 1.0, "peak_memory_bytes": 1}
    run = Outcome(summary, {"losses": [1.0, 2.0], "bytes": 8, "tokens": [2, 2]})
    loop = ArmResult(parse_arm("loop"), runs=dict.fromkeys(range(3), run))
    result = ArmResult(parse_arm("dense"), runs=dict.fromkeys(range(2), run))
    assert arm_figures(result, loop)["difference"] is not None
    result.keep(2, Outcome(None, None), print)
    figures = arm_figures(result, loop)
    assert figures["difference"] is None
    assert figures["problem"] == "seed 2: its loss diverged"
    assert list(_problems({"dense": figures}))[1] == "No claim about `dense`: seed 2: its loss diverged"


def test_bits_per_byte_weigh_windows_by_what_is_predicted_in_them() -> None:
    summary = {"result": {"parameters": 1, "widths": {}, "path": ""}, "tokens": 1, "flops": 1}
    summary |= {"seconds": 1.0, "peak_memory_bytes": 1}

    def bits(tokens: object) -> float:
        windows = {"losses": [9.0, 1.0, 9.0, 2.0], "bytes": 80, "tokens": tokens}
        return float(run_figures(Outcome(summary, windows))["bits_per_byte"])

    assert bits([10, 30, 10, 10]) == pytest.approx((30 * 1.0 + 10 * 2.0) / 40 * 60 / 80 / math.log(2))
    assert bits(10) == bits([10] * 4) == pytest.approx(1.5 * 40 / 80 / math.log(2))  # a number: files of older runs


class Listed(list[torch.Tensor]):
    """Rows as a corpus."""

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([self[index] for index in indices])


def test_windows_count_and_decode_only_what_is_predicted() -> None:
    """Of rows with labels and with positions beside their tokens, as of text alone."""
    tokenizer = small_tokenizer()
    stream = [token for token in stream_of(STORIES) if token != tokenizer.eos_token_id]
    ids = np.asarray(stream[: 5 * LENGTH]).reshape(5, LENGTH)
    marks = np.full(ids.shape, CONTEXT, dtype=np.uint8)
    marks[:, 9:12], marks[0, 3] = 0, 0
    model = tiny_model("llama-gqa", vocab_size=len(tokenizer)).eval()
    for planes in Planes:
        told = None if planes == Planes.TOKENS else marks
        rows = torch.from_numpy(with_planes(ids, told, planes, -1))
        job = SimpleNamespace(validation=[Listed(rows)], plan=SimpleNamespace(pace=SimpleNamespace(rows=None)))
        job.recipe = SimpleNamespace(train=SimpleNamespace(micro_batch=2))
        job.device, job.precision, job.chunked_loss, job.tokenizer = "cpu", Precision("cpu", False), False, tokenizer
        found = worker.window_losses(job, model)  # type: ignore[arg-type]
        parts = [row[1:] if told is None else row[mark == 0] for row, mark in zip(ids, marks, strict=True)]
        assert found["tokens"] == [len(part) for part in parts]
        assert found["bytes"] == sum(len(tokenizer.decode(part).encode()) for part in parts)
        assert found["losses"] == pytest.approx(row_losses(model, rows, job.precision).tolist(), rel=1e-5)


def test_accuracy_over_first_records_leaves_that_over_all_of_them_alone(tmp_path: Path) -> None:
    run = Outcome({"result": {"path": str(tmp_path / "model")}}, None)
    whole, limited = {"acc,none": 0.75}, {"acc,none": 0.25}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps({"results": {"boolq": whole}, "limit": None}))
    assert task_accuracy(run, "boolq", EvalRequest(["boolq"])) == 0.75
    assert task_accuracy(run, "boolq", EvalRequest(["boolq"], limit=4)) is None
    (tmp_path / "eval" / "results-limit-4.json").write_text(json.dumps({"results": {"boolq": limited}, "limit": 4}))
    assert task_accuracy(run, "boolq", EvalRequest(["boolq"], limit=4)) == 0.25
    assert task_accuracy(run, "boolq", EvalRequest(["boolq"])) == 0.75


def test_shapes_are_tested_where_two_seeds_have_each() -> None:
    assert _between_shapes([[1.0, 1.1], [1.2]]) is None
    assert _between_shapes([[1.0]]) is None
    found = _between_shapes([[1.0], [1.1, 1.2], [2.0, 2.1, 2.2]])
    assert found is not None
    assert found["mean"] == pytest.approx(2.1 - 1.15)


def test_structure_says_what_cannot_be_said() -> None:
    widths = [{"intermediate": 72, "heads": 3, "hidden": 100}, {"intermediate": 112, "heads": 2, "hidden": 100}]
    runs = {str(seed): {"widths": each, "loss": 4.0} for seed, each in enumerate(widths)}
    overlap = {"ffn": {"jaccard": 0.5, "chance": 0.1}}
    structure = {"loop": {"overlap": overlap, "spread": {"intermediate": 40, "heads": 1, "hidden": 0}, "shapes": None}}
    page = "\n".join(_structure({"structure": structure, "budgets": {"tokens": {"loop": {"runs": runs}}}}))
    lines = page.splitlines()
    assert "| 40/1/0 |" in lines[-3]
    assert "cannot be said: that takes two seeds" in lines[-1]


def test_a_shape_that_was_given_is_said() -> None:
    settings = {"seeds": [0, 1], "arms": ["loop", "one-shot@loop", "dense", "scratch+distill"]}
    text = " ".join(_reach({"settings": settings}))
    assert "`one-shot@loop`, `scratch+distill` were given" in text
    assert "this one source" in text
