"""`efficientllm probe`: which criterion suits this model? Scores against true loss increases, as table and picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from efficientllm.config import DataConfig
from efficientllm.data.corpus import load_corpora
from efficientllm.data.sampling import BatchStream
from efficientllm.errors import UsageError
from efficientllm.evaluation.probe import Scores, criteria_scores, judge, loss_increases, sample_units
from efficientllm.jobs.job import choose_device
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.models.space import space_of
from efficientllm.reporting.journal import without_nonfinite, write_atomically
from efficientllm.reporting.probe_plot import plot_probe
from efficientllm.reporting.progress import RunProgress
from efficientllm.training.gradient import Precision


@dataclass(frozen=True)
class ProbeRequest:
    """What to probe. units: sampled of each type; batches of `rows` rows of `sequence_length` tokens each."""

    model: str
    data: Sequence[str]
    out: Path
    text_column: str = "text"
    types: Sequence[str] = ("attention", "attention_query", "ffn", "stem")
    units: int = 24
    batches: int = 8
    rows: int = 8
    sequence_length: int = 256
    micro_batch: int = 8
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
    data = DataConfig.model_validate(
        {
            "train": list(request.data),
            "text_column": request.text_column,
            "sequence_length": request.sequence_length,
        }
    )
    training, _ = load_corpora(data, tokenizer, vocab_size=model.config.vocab_size, on_progress=say)
    stream = BatchStream(training, [corpus.weight for corpus in training], request.rows, request.seed)
    batches = [stream.batch(step).to(device) for step in range(request.batches)]
    space = space_of(model.config)
    units = sample_units(space, request.types, request.units, request.seed)
    with RunProgress(0, description="probe") as progress:
        with progress.track("scores by every criterion", 2 * len(batches)) as tracker:
            scores = criteria_scores(model, batches, request.micro_batch, precision, tracker.advance)
        with progress.track("removing units one by one", len(units)) as tracker:
            samples = loss_increases(model, units, torch.cat(batches), request.micro_batch, precision, tracker.advance)
    verdict = judge(samples, scores)
    table = [asdict(sample) | {"scores": _scores_of(scores, sample)} for sample in samples]
    tokens = sum(batch.numel() for batch in batches)
    result = {"model": request.model, "tokens": tokens, "criteria": verdict, "units": table}
    content = json.dumps(without_nonfinite(result), indent=1, allow_nan=False)
    write_atomically(request.out / "probe.json", (content + "\n").encode())
    plot_probe(table, list(verdict), request.out / "probe.png")
    return result


def _scores_of(scores: Scores, sample: Any) -> dict[str, float]:
    return {name: float(by_type[sample.type][sample.row, sample.unit]) for name, by_type in scores.items()}
