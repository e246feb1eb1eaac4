"""Text of `real.py`: what is trained on, what is held out, losses on it and their paired differences."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from torch.nn import functional

from efficientllm.files import atomic_path
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.models.vocabulary import token_bytes
from efficientllm.training.chunked_loss import IGNORED
from efficientllm.training.gradient import Precision, predicted_tokens, row_losses

LENGTH, ROWS_AT_ONCE = 512, 2
SHARES = {"c4-rp": 0.4, "book": 0.3, "wiki": 0.2, "cc": 0.1}  # of the training tokens; by how much text there is
ROWS = 30  # held-out rows of a domain; of short documents fewer
BOOK_ROWS = 7  # of each held-out book
Losses = dict[str, dict[str, list[float]]]  # held-out set -> document -> mean nats of its rows


def split_domains(domains: Path, corpus: Path) -> None:
    """NAME.jsonl to train on and NAME.held.jsonl: every fourth document of the small domains, every twentieth else."""
    if corpus.is_dir():
        return
    with atomic_path(corpus) as partial:
        for name in SHARES:
            texts = [json.loads(line)["text"] for line in (domains / f"{name}.jsonl").open(encoding="utf-8")]
            every = 20 if len(texts) >= 1000 else min(4, len(texts))
            for suffix, held in (("", False), (".held", True)):
                chosen = [text for at, text in enumerate(texts) if (at % every == every - 1) == held]
                lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
                (partial / f"{name}{suffix}.jsonl").write_text(lines)


def held_out(corpus: Path, books: Path, tokenizer: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(set, document, its rows (rows, length)), rows spread evenly over each document; of a short one a short row."""
    for name in SHARES:
        texts = [json.loads(line)["text"] for line in (corpus / f"{name}.held.jsonl").open(encoding="utf-8")]
        texts = texts[:ROWS]
        for at, text in enumerate(texts):
            number = ROWS // len(texts) + (at < ROWS % len(texts))
            yield "domains", f"{name} {at}", rows_of(tokenizer, text, number)
    for file in sorted(books.glob("validation-*.parquet")):
        for at, text in enumerate(parquet.read_table(file, columns=["text"])["text"].to_pylist()):
            yield "books", f"{file.stem} {at}", rows_of(tokenizer, text, BOOK_ROWS)


def rows_of(tokenizer: Any, text: str, number: int) -> torch.Tensor:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    length = min(LENGTH, len(ids))
    last = len(ids) - length
    starts = sorted({last * at // max(1, number - 1) for at in range(number)})
    return torch.stack([ids[start : start + length] for start in starts])


def measure(model_path: str, source: str, corpus: Path, books: Path, file: Path) -> Losses:
    """Losses of a model on the held-out rows, in nats for each token of the source; kept in `file`."""
    if file.is_file():
        losses: Losses = json.loads(file.read_text())
        return losses
    model, precision = load_model(model_path, use="evaluated").eval(), Precision("cpu", bf16=False)
    tokenizer, own = load_tokenizer(source), load_tokenizer(model_path)
    same = tokenizer.get_vocab() == own.get_vocab()
    losses = {"domains": {}, "books": {}}
    for kind, document, rows in held_out(corpus, books, tokenizer):
        if same:
            parts = [row_losses(model, part, precision) for part in rows.split(ROWS_AT_ONCE)]
            losses[kind][document] = torch.cat(parts).tolist()
            continue
        spelt = [respelt(row, tokenizer, own) for row in rows]
        nats = [float(row_losses(model, each[None], precision)) * predicted_tokens(each[None]) for each in spelt]
        losses[kind][document] = [each / (rows.shape[1] - 1) for each in nats]
    file.write_text(json.dumps(losses))
    return losses


def respelt(row: torch.Tensor, tokenizer: Any, own: Any) -> torch.Tensor:
    """A row (length,) in the tokens of a cut tokenizer, each of the first's made of what is left: (pieces, 2) with the
    label at each place. The same bytes are predicted: those of all tokens but the first."""
    there, model = own.get_vocab(), own.backend_tokenizer.model
    tokens = tokenizer.convert_ids_to_tokens(row.tolist())
    pieces = [[there[each]] if each in there else [part.id for part in model.tokenize(each)] for each in tokens]
    ids = torch.tensor([each for token in pieces for each in token])
    labels = functional.pad(ids[1:], (0, 1), value=IGNORED)
    labels[: len(pieces[0]) - 1] = IGNORED
    return torch.stack([ids, labels], dim=1)


def bytes_per_token(source: str, corpus: Path, books: Path) -> dict[str, float]:
    """UTF-8 bytes of a token that is predicted, the mean over the rows of each held-out set."""
    tokenizer, found = load_tokenizer(source), dict[str, list[float]]()
    sizes = token_bytes(tokenizer, len(tokenizer))
    for kind, _, rows in held_out(corpus, books, tokenizer):
        found.setdefault(kind, []).extend(sizes[rows[:, 1:]].double().mean(1).tolist())
    return {kind: statistics.fmean(each) for kind, each in found.items()}


def pooled(losses: dict[str, list[float]], documents: list[str]) -> float:
    """Mean over the rows of some documents."""
    return statistics.fmean([row for document in documents for row in losses[document]])


def difference(own: dict[str, list[float]], base: dict[str, list[float]]) -> str:
    """Own - base with its bootstrap interval over documents (all rows of a document fall or stay together)."""
    names, chooser = sorted(own), random.Random(0)
    draws = []
    for _ in range(2000):
        drawn = chooser.choices(names, k=len(names))
        draws.append(pooled(own, drawn) - pooled(base, drawn))
    draws.sort()
    return f"{pooled(own, names) - pooled(base, names):+.3f} ({draws[50]:+.3f} to {draws[1949]:+.3f})"
