"""Which criterion chooses best: the least salient share of one type removed at once, corrected, by each of them.

    python benchmarks/criteria.py MODEL --train TEXT [TEXT ...] --validation TEXT [TEXT ...]
        [--rows 8] [--length 512] [--shares ffn=1/3 attention_query=1/3 stem=1/10] [--plain]

All criteria see the same rows of the training text, and so does the second-order correction of what is left (--plain:
without it). The loss increase is measured on rows of the validation text, in nats. predicted: the sum of the scores,
which for a criterion in nats should be as large. One look of few rows at once: what a run does next is another matter.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efficientllm.config import DataConfig
from efficientllm.data.corpus import Corpus, load_corpora
from efficientllm.evaluation.probe import criteria_scores
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.models.space import space_of
from efficientllm.pruning.correction import SolverOptions, correct
from efficientllm.pruning.groups import Removal, Space
from efficientllm.pruning.live import Live
from efficientllm.pruning.readers import losing_readers, reader_specs
from efficientllm.pruning.slices import group_slices
from efficientllm.training.gradient import Precision, mean_loss, summed_loss
from efficientllm.training.hooks import captured_inputs

CPU = Precision("cpu", bf16=False)
MICRO_BATCH = 2


def rows_of(corpora: list[Corpus], rows: int) -> Tensor:
    """As many rows of each corpus, spread evenly over it, (rows, length)."""
    parts = []
    for place, corpus in enumerate(corpora):
        number = rows // len(corpora) + (place < rows % len(corpora))
        parts.append(corpus.take([len(corpus) * each // number for each in range(number)]))
    return torch.cat(parts)


def loss_of(model: PreTrainedModel, rows: Tensor) -> float:
    parts = ((part, True) for part in rows.split(MICRO_BATCH))
    return mean_loss(partial(summed_loss, model, precision=CPU), parts)


@torch.no_grad()
def increase(
    model: PreTrainedModel, space: Space, cuts: list[Removal], inputs: Mapping[str, Tensor] | None, held: Tensor
) -> float:
    """Loss without these units; inputs: what the rest is corrected on. Every weight is put back."""
    params, live = dict(model.named_parameters()), Live.full(space.widths)
    for cut in cuts:
        live.remove(cut)
    readers = list(losing_readers(space, cuts, live))
    before = {name: weight.detach().clone() for name, weight in params.items()}
    if inputs is not None:
        correct(params, readers, inputs, SolverOptions())
    for part in group_slices(space, cuts):
        params[part.name].index_fill_(part.dim, part.indices, 0.0)
    loss = loss_of(model, held)
    for name, weight in params.items():
        weight.copy_(before[name])
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True, nargs="+")
    parser.add_argument("--validation", required=True, nargs="+")
    parser.add_argument("--rows", type=int, default=8, help="of the training text, and of the validation text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shares", nargs="+", default=["ffn=1/3", "attention_query=1/3", "stem=1/10"])
    parser.add_argument("--plain", action="store_true", help="without correction")
    arguments = parser.parse_args()
    data = {"train": arguments.train, "validation": arguments.validation, "sequence_length": arguments.length}
    train, validation = load_corpora(DataConfig.model_validate(data), load_tokenizer(arguments.model))
    model = load_model(arguments.model).eval()
    space = space_of(model.config)
    held = rows_of(validation, arguments.rows)
    rows = rows_of(train, arguments.rows)
    scores = criteria_scores(model, [rows], MICRO_BATCH, CPU, lambda _: None)
    readers = [spec.name for spec in reader_specs(space)]
    with torch.no_grad(), captured_inputs(model, readers) as inputs:
        for part in rows.split(MICRO_BATCH):
            model(input_ids=part, use_cache=False)
    base = loss_of(model, held)
    print(
        f"loss as it is: {base:.3f}\n\n| removed | criterion | loss increase | predicted |\n| --- | --- | --- | --- |"
    )
    for wanted in arguments.shares:
        pruning_type, share = wanted.split("=")
        for name, by_type in scores.items():
            values, order = by_type[pruning_type].double().sort(dim=1, stable=True)
            number = max(1, round(Fraction(share) * order.shape[1]))
            cuts = [Removal(pruning_type, units) for units in order[:, :number].T]
            change = increase(model, space, cuts, None if arguments.plain else inputs, held) - base
            predicted = float(values[:, :number].sum())
            print(f"| {share} of {pruning_type} | {name} | {change:.3f} | {predicted:.3g} |", flush=True)


if __name__ == "__main__":
    main()
