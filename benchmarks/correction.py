"""The second-order correction against the usual way: conjugate gradients, or forming and inverting the Hessian.

    python benchmarks/correction.py [--widths 512 1024 2048 4096 8192] [--tokens 4096] [--json OUT]
    python benchmarks/correction.py --model MODEL --text FILE.jsonl ...

One linear layer loses one input. Both get the same inputs (low rank plus noise, as activations are) and fp32; the
usual way forms X^T X + lambda I, inverts it through its Cholesky factor and takes the OBS column update
(arXiv 2301.00774, eq. 3). The two take turns in one process; quoted are medians over repeats of the ratio of their
times, the memory that each needs beside X and W, and the layer's output error after each over that without correction,
on the tokens that the correction saw and on as many others from the same distribution.
On a GPU where there is one, else on the CPU.

With --model, how much damping? A fifteenth of the units of a type falls from every fourth layer of a real model; the
layers that read them are corrected on so many tokens of the texts, and their output error is measured on 4,096 tokens
that come after, again over that without correction: its mean over layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.models.space import space_of
from efficientllm.pruning.correction import SolverOptions, corrected, forms_gram, solve_coefficients
from efficientllm.pruning.dimensions import ATTENTION_QUERY, FFN_TYPE, STEM
from efficientllm.pruning.groups import Removal
from efficientllm.pruning.live import Live
from efficientllm.pruning.readers import Reader, losing_readers
from efficientllm.training.hooks import captured_inputs

USUAL = 0.01  # damping of the usual way: a share of the mean diagonal of X^T X
DAMPINGS = (0.125, 0.5, 1.0, 2.0, 4.0, 16.0)


def activations(tokens: int, width: int, device: str) -> Tensor:
    """(2 * tokens, width), seen and unseen: an eighth of the width in directions of falling strength, and noise."""
    tokens *= 2
    generator = torch.Generator(device).manual_seed(0)
    rank = max(8, width // 8)
    factors = torch.randn(tokens, rank, generator=generator, device=device)
    factors *= torch.arange(1, rank + 1, device=device) ** -0.5
    noise = torch.randn(tokens, width, generator=generator, device=device)
    return factors @ torch.randn(rank, width, generator=generator, device=device) + noise


def usual(inputs: Tensor, weight: Tensor, column: int) -> Tensor:
    """W after the OBS update for one column, by the inverse of the whole Hessian."""
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(USUAL * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return weight - weight[:, column, None] * (inverse[column] / inverse[column, column])


def ours(inputs: Tensor, weight: Tensor, column: int) -> tuple[Tensor, int]:
    removed = torch.tensor([[column]], device=inputs.device)
    kept = torch.ones(1, inputs.shape[1], dtype=torch.bool, device=inputs.device)
    kept[0, column] = False
    solution = solve_coefficients(inputs[None], removed, kept, SolverOptions())
    assert bool(solution.converged.all())
    return corrected(weight, removed[0], solution.coefficients[0]), solution.iterations


def seconds(start: float, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(width: int, tokens: int, repeats: int, device: str) -> dict[str, float]:
    inputs, unseen = activations(tokens, width, device).split(tokens)
    weight = torch.randn(256, width, device=device)
    column, ratios, times = width // 3, [], []
    for _ in range(repeats):
        start = time.perf_counter()
        theirs = usual(inputs, weight, column)
        usual_seconds = seconds(start, device)
        start = time.perf_counter()
        mine, iterations = ours(inputs, weight, column)
        times.append(seconds(start, device))
        ratios.append(usual_seconds / times[-1])

    def error(x: Tensor, after: Tensor) -> float:
        lost = torch.outer(x[:, column], weight[:, column])
        return round(float((x @ (weight - after).T).norm() / lost.norm()), 4)

    return {
        "width": width,
        "times_faster": round(statistics.median(ratios), 1),
        "seconds": round(statistics.median(times), 4),
        "iterations": iterations,
        "error_ours": error(inputs, mine),
        "error_usual": error(inputs, theirs),
        "unseen_error_ours": error(unseen, mine),
        "unseen_error_usual": error(unseen, theirs),
        "mib_ours": round((tokens * width + (width * width if forms_gram(tokens, width, 1) else 0)) * 4 / 2**20, 1),
        "mib_usual": round(2 * width * width * 4 / 2**20, 1),
    }


@torch.no_grad()
def sweep(path: str, texts: list[Path], lengths: tuple[int, ...] = (1024, 4096, 12288), unseen: int = 4096) -> None:
    """Prints a Markdown table: error on tokens not seen by type, tokens and damping; `usual`: a hundredth of the mean
    diagonal."""
    model, tokenizer = load_model(path).eval(), load_tokenizer(path)
    space, wanted = space_of(model.config), -(-(max(lengths) + unseen) // len(texts))
    rows = []
    for file in texts:
        ids: list[int] = []
        with file.open() as lines:
            while len(ids) < wanted:
                ids += tokenizer(json.loads(next(lines))["text"])["input_ids"]
        rows.append(torch.tensor(ids[: wanted // 512 * 512]).reshape(-1, 512))
    print("| type | tokens | usual | " + " | ".join(map(str, DAMPINGS)) + " |\n" + "| --- " * (len(DAMPINGS) + 3) + "|")
    for kind in (FFN_TYPE, ATTENTION_QUERY, STEM):
        live = Live.full(space.widths)
        cuts = []
        for unit in range(0, live.units(kind).shape[1], 15):
            cuts.append(Removal(kind, torch.full((len(live.units(kind)),), unit)))
            live.remove(cuts[-1])
        readers = [each for each in losing_readers(space, cuts, live) if int(each.name.split(".")[2]) % 4 == 1]
        with captured_inputs(model, [reader.name for reader in readers]) as inputs:
            for row in torch.stack(rows, 1).flatten(0, 1).split(2):  # the texts in turn
                model.model(row)
        for tokens in lengths:
            errors: list[list[float]] = [[] for _ in range(len(DAMPINGS) + 1)]
            for reader in readers:
                x = inputs[reader.source]
                share = USUAL * tokens / int(reader.kept.sum())
                for found, damping in zip(errors, (share, *DAMPINGS), strict=True):
                    found.append(
                        error_unseen(x[:tokens], x[-unseen:], reader, model.get_parameter(reader.name), damping)
                    )
            cells = (f"{statistics.mean(each):.3f}" for each in errors)
            print(f"| {kind} | {tokens:,} | " + " | ".join(cells) + " |", flush=True)


def error_unseen(seen: Tensor, unseen: Tensor, reader: Reader, weight: Tensor, damping: float) -> float:
    solution = solve_coefficients(seen[None], reader.removed[None], reader.kept[None], SolverOptions(damping))
    lost = unseen[:, reader.removed] @ weight[:, reader.removed].T
    after = corrected(weight, reader.removed, solution.coefficients[0])
    return float((lost - (unseen * reader.kept) @ (after - weight).T).norm() / lost.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.model:
        return sweep(arguments.model, arguments.text)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for width in arguments.widths:
        rows.append(measure(width, arguments.tokens, arguments.repeats, device))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
