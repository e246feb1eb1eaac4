"""Should a norm's gain be corrected when the mean inside it loses a channel? Validation loss right after stem events.

    python benchmarks/norm_gain.py MODEL --train TEXT --validation TEXT [--seeds 3]

Removes 1, 4 and 16 residual channels at random from a trained model, with and without the second-order correction, and
with and without multiplying every norm's gain by the mean over tokens of sqrt(1 - share of the lost channels in the
sum of squares), which is what the lost channels took from the norm.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor, nn

from efficientllm.config import DataConfig
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.models.space import space_of
from efficientllm.pruning.correction import SolverOptions, correct, losing_readers
from efficientllm.pruning.groups import STEM, Event, Live, group_slices
from efficientllm.training.capture import captured_inputs
from efficientllm.training.corpus import load_corpora
from efficientllm.training.gradient import Precision, mean_loss

CPU = Precision("cpu", bf16=False)
LENGTH = 256


def events_of(live: Live, number: int, seed: int) -> list[Event]:
    order = torch.randperm(len(live.hidden), generator=torch.Generator().manual_seed(seed))[:number]
    events = [Event(STEM, unit[None], 0.0, 1.0) for unit in order]
    for event in events:
        live.remove(event)
    return events


def loss_after(path: str, number: int, seed: int, rows: Tensor, held: Tensor, *, corrected: bool, gain: bool) -> float:
    model = load_model(path).eval()
    space, params = space_of(model.config), dict(model.named_parameters())
    live = Live.full(space.widths)
    events = events_of(live, number, seed)
    lost = torch.cat([event.units for event in events])
    readers = list(losing_readers(space, events, live))
    left: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].flatten(0, -2).square()
            left[name].append((1.0 - squares[:, lost].sum(1) / squares.sum(1)).sqrt())

        handles.append(model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in space.stem_gains:
        watch(name)
    with torch.no_grad(), captured_inputs(model, [reader.name for reader in readers]) as inputs:
        for part in rows.split(8):
            model(input_ids=part)
    for handle in handles:
        handle.remove()
    if corrected:
        correct(params, readers, inputs, SolverOptions())
    if gain:
        for name, shares in left.items():
            params[name].detach().mul_(torch.cat(shares).mean())
    for piece in group_slices(space, events):
        params[piece.name].detach().index_fill_(piece.dim, piece.indices, 0.0)
    return mean_loss(model, held.split(8), CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    data = {"train": arguments.train, "validation": arguments.validation, "sequence_length": LENGTH}
    tokenizer = load_tokenizer(arguments.model)
    (train,), (validation,) = load_corpora(DataConfig.model_validate(data), tokenizer, vocab_size=None)
    rows = train.take(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:16].tolist())
    held = validation.take(range(0, len(validation), max(1, len(validation) // 86)))
    print("channels | seed | zeroed | zeroed, gain | corrected | corrected, gain")
    for number in (1, 4, 16):
        for seed in range(arguments.seeds):
            losses = [
                loss_after(arguments.model, number, seed, rows, held, corrected=corrected, gain=gain)
                for corrected in (False, True)
                for gain in (False, True)
            ]
            print(number, seed, *(f"{loss:.4f}" for loss in losses), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
