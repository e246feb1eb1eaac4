"""What removing units does at once, without training: zeroed, corrected on more or fewer tokens, gains corrected too.

    python benchmarks/at_once.py MODEL --train TEXT --validation TEXT [--seeds 3]

Removes random units of one type from every layer of a trained model and prints the mean validation loss over seeds.
Gains (stem only): every norm's gain is multiplied by the mean over tokens of sqrt(1 - share of the lost channels in the
sum of squares), which is what the lost channels take from the norm.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from functools import partial

import torch
from torch import Tensor, nn

from efficientllm.config import DataConfig
from efficientllm.data.corpus import Corpus, load_corpora
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.models.space import space_of
from efficientllm.pruning.correction import SolverOptions, correct
from efficientllm.pruning.dimensions import ATTENTION, FFN_TYPE, HIDDEN, STEM
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.live import Live
from efficientllm.pruning.readers import losing_readers
from efficientllm.pruning.slices import group_slices
from efficientllm.training.gradient import Precision, mean_loss, summed_loss
from efficientllm.training.hooks import captured_inputs

CPU = Precision("cpu", bf16=False)
LENGTH = 256
CASES = ((FFN_TYPE, 4), (FFN_TYPE, 96), (STEM, 1), (STEM, 4), (STEM, 16), (ATTENTION, 1))
WAYS = {"zeroed": (0, False), "gain": (4096, True), "2,048": (2048, False), "4,096": (4096, False)}
WAYS |= {"16,384": (16384, False), "4,096 and gain": (4096, True)}


def events_of(live: Live, pruning_type: str, number: int, seed: int) -> list[Removal]:
    generator, events = torch.Generator().manual_seed(seed), []
    for _ in range(number):
        units = live.units(pruning_type)
        noise = torch.rand(units.shape, generator=generator).masked_fill(~units, -1.0)
        events.append(Removal(pruning_type, noise.argmax(1)))
        live.remove(events[-1])
    return events


def loss_after(path: str, events: list[Removal], live: Live, rows: Tensor, held: Tensor, way: str) -> float:
    """rows: what inputs are captured on, (rows, length); held: what the loss is measured on."""
    model = load_model(path).eval()
    space, params = space_of(model.config), dict(model.named_parameters())
    readers = list(losing_readers(space, events, live))
    left: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    if "gain" in way:
        lost = torch.cat([event.units for event in events])
        gains = [spec.name for spec in space.params if spec.axes == (HIDDEN,) and "norm" in spec.name]
        handles = [watch(model, name, lost, left) for name in gains]
    with torch.no_grad(), captured_inputs(model, [reader.name for reader in readers]) as inputs:
        for part in rows.split(8):
            model(input_ids=part)
    for handle in handles:
        handle.remove()
    if way not in ("zeroed", "gain"):
        correct(params, readers, inputs, SolverOptions())
    for name, shares in left.items():
        params[name].detach().mul_(torch.cat(shares).mean())
    for piece in group_slices(space, events):
        params[piece.name].detach().index_fill_(piece.dim, piece.indices, 0.0)
    return loss_of(model, held)


def watch(
    model: nn.Module, gain: str, lost: Tensor, left: dict[str, list[Tensor]]
) -> torch.utils.hooks.RemovableHandle:
    """Notes what the lost channels leave of the root mean square before a norm."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares = args[0].flatten(0, -2).square()
        left[gain].append((1.0 - squares[:, lost].sum(1) / squares.sum(1)).sqrt())

    return model.get_submodule(gain.removesuffix(".weight")).register_forward_pre_hook(hook)


def loss_of(model: nn.Module, held: Tensor) -> float:
    return mean_loss(partial(summed_loss, model, precision=CPU), ((rows, True) for rows in held.split(8)))


def rows_of(corpus: Corpus, tokens: int) -> Tensor:
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0))
    return corpus.take(order[: max(1, tokens // LENGTH)].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    data = {"train": arguments.train, "validation": arguments.validation, "sequence_length": LENGTH}
    tokenizer = load_tokenizer(arguments.model)
    (train,), (validation,) = load_corpora(DataConfig.model_validate(data), tokenizer)
    held = validation.take(range(0, len(validation), max(1, len(validation) // 86)))
    model = load_model(arguments.model).eval()
    widths = space_of(model.config).widths
    print(f"as it is: {loss_of(model, held):.3f}")
    print("| removed | " + " | ".join(WAYS) + " |")
    for pruning_type, number in CASES:
        cells = []
        for way, (tokens, gain) in WAYS.items():
            if gain and pruning_type != STEM:
                cells.append("-")
                continue
            losses = []
            for seed in range(arguments.seeds):
                live = Live.full(widths)
                events = events_of(live, pruning_type, number, seed)
                losses.append(loss_after(arguments.model, events, live, rows_of(train, tokens), held, way))
            cells.append(f"{statistics.mean(losses):.3f}")
        print(f"| {number} {pruning_type} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
