"""`efficientllm probe`: which criterion suits this model? Scores against true loss increases, as table and picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efficientllm.config import DataConfig
from efficientllm.data.corpus import load_corpora
from efficientllm.data.sampling import BatchStream
from efficientllm.errors import UsageError
from efficientllm.evaluation.probe import criteria_scores, gradient, judge
from efficientllm.evaluation.removal import Unit, loss_increases, passes, sample_units
from efficientllm.files import write_json
from efficientllm.jobs.device import choose_device
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.models.space import space_of
from efficientllm.reporting.journal import without_nonfinite
from efficientllm.reporting.plot_measurements import plot_probe
from efficientllm.reporting.progress import RunProgress
from efficientllm.training.gradient import Precision, token_ids

MINUTES = 10  # that the number of tokens is chosen for, where it is not given
MOST_TOKENS = 16_384
BATCH_ROWS = 8  # whose gradient the scores are taken from, averaged over batches


@dataclass(frozen=True)
class ProbeRequest:
    """What to probe. units: sampled of each type. tokens: in rows of `sequence_length`; None: as many as MINUTES allow,
    a batch at least and MOST_TOKENS at most."""

    model: str
    data: Sequence[str]
    out: Path
    text_column: str = "text"
    types: Sequence[str] = ("attention", "attention_query", "ffn", "stem")
    units: int = 24
    tokens: int | None = None
    sequence_length: int = 256
    micro_batch: int = 4
    seed: int = 0
    device: str = "auto"


def run_probe(request: ProbeRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures, writes probe.json and probe.png into `out`, and returns the verdict. Raises UsageError."""
    device = choose_device(request.device)
    precision = Precision.choose("fp32", device)  # single units of a large model change the loss by less than bf16 sees
    tokenizer = load_tokenizer(request.model)
    model = load_model(request.model, device=device).eval()
    limit = model.config.max_position_embeddings
    if request.sequence_length > limit:
        raise UsageError(f"--sequence-length {request.sequence_length} is more than the model's {limit} positions")
    train = [{"path": path, "text_column": request.text_column} for path in request.data]
    data = DataConfig.model_validate({"train": train, "sequence_length": request.sequence_length})
    training, _ = load_corpora(data, tokenizer, vocab_size=model.config.vocab_size, on_progress=say)
    units = sample_units(space_of(model.config), request.types, request.units, request.seed)
    weights = [corpus.weight for corpus in training]
    row = BatchStream(training, weights, 1, request.seed).batch(0).to(device)
    batch_rows, number = _size(request, model, row, units, precision, say)
    stream = BatchStream(training, weights, batch_rows, request.seed)
    batches = [stream.batch(step).to(device) for step in range(number)]
    with RunProgress(0, description="probe") as progress:
        with progress.track("scores by every criterion", len(batches)) as tracker:
            scores = criteria_scores(model, batches, request.micro_batch, precision, tracker.advance)
        rows = torch.cat(batches)
        removals = len(units) * len(rows.split(request.micro_batch))
        with progress.track("removing units one by one", removals) as tracker:
            samples = loss_increases(model, units, rows, request.micro_batch, precision, tracker.advance)
    verdict = judge(samples, scores)
    table = [
        asdict(each)
        | {"scores": {name: float(by_type[each.type][each.row, each.unit]) for name, by_type in scores.items()}}
        for each in samples
    ]
    result = {"model": request.model, "tokens": token_ids(rows).numel(), "criteria": verdict, "units": table}
    write_json(request.out / "probe.json", without_nonfinite(result))
    plot_probe(table, list(verdict), request.out / "probe.png")
    return result


def _size(
    request: ProbeRequest,
    model: PreTrainedModel,
    row: Tensor,
    units: Sequence[Unit],
    precision: Precision,
    say: Callable[[str], None],
) -> tuple[int, int]:
    """Rows of a batch and number of batches, and says how long they will take, by one row (1, length) measured."""
    forward = _seconds(lambda: loss_increases(model, [], row, 1, precision, lambda _: None), row.device)
    backward = _seconds(lambda: gradient(model, row, 1, precision), row.device)
    each = passes(space_of(model.config), units, row.shape[1]) * forward + backward
    tokens = request.tokens or min(MOST_TOKENS, round(60 * MINUTES / each) * row.shape[1])
    rows = max(1, tokens // row.shape[1])
    batch_rows = min(BATCH_ROWS, rows) if request.tokens else BATCH_ROWS
    number = max(1, rows // batch_rows)
    seconds = number * batch_rows * each
    say(
        f"removing {len(units)} units, each on {number * batch_rows * row.shape[1]:,} tokens, will take about "
        + (f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1, round(seconds))} seconds")
        + " (one row measured; --tokens sets another number)"
    )
    return batch_rows, number


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call; the first one also allocates memory and chooses kernels."""
    for _ in range(2):
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
    return taken
