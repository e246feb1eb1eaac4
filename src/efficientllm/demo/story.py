"""The demo: train a source, prune it while it trains, train the same shape from scratch, compare.

Every stage is an ordinary run on an ordinary recipe; a finished stage is not repeated, an interrupted one goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import LlamaConfig

from efficientllm.config import Recipe
from efficientllm.demo.corpus import train_tokenizer, write_corpus
from efficientllm.demo.speed import forward_speeds, speed_once_pruned
from efficientllm.files import atomic_path
from efficientllm.jobs.prune import run
from efficientllm.reporting.tables import console
from efficientllm.sizes import format_count

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSize:
    """How large the demo is. Tokens are those of training; lr is AdamW's peak."""

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    sequence_length: int = 256
    batch_tokens: int = 2048
    source_tokens: int = 1_000_000
    prune_tokens: int = 400_000
    lr: float = 4e-3
    initializer_range: float = 0.06  # transformers' 0.02 suits wide models; one this narrow would sit on a plateau
    validation_tokens: int = 16_384  # the same rows for all stages, which stand in one table


def run_demo(folder: Path, say: Say, size: DemoSize | None = None) -> dict[str, dict[str, Any]]:
    """All stages under `folder`; prints the table to stdout and returns each stage's summary by name."""
    size = size or DemoSize()
    corpus = prepare_corpus(folder, size, say)
    start = write_architecture(folder, corpus, size)

    def stage(name: str, source: Path, tokens: int, **more: Any) -> dict[str, Any]:
        return run(Recipe.model_validate(stage_recipe(folder, name, source, tokens, size) | more), say)

    say("1 of 3: a source model, trained from nothing")
    source = stage("source", start, size.source_tokens, init="random")
    say("2 of 3: pruned to 40 % while it keeps training")
    compact = stage("compact", folder / "source" / "model", size.prune_tokens, prune={"target": "40%"})
    say("3 of 3: the control, the same final shape from scratch on the same batches")
    scratch = stage("scratch", folder / "compact" / "model", size.prune_tokens, init="random")
    summaries = {"source": source, "compact": compact, "from scratch": scratch}
    print_table(summaries, size)
    say(f"picture: {folder / 'compact' / 'run.png'} (saliency, pruning ratio and loss over tokens)")
    return summaries


def stage_recipe(folder: Path, name: str, source: Path, tokens: int, size: DemoSize) -> dict[str, Any]:
    """The recipe of one run under `folder`, on the corpus there, without its prune section."""
    corpus = folder / "corpus"
    return {
        "source": str(source),
        "data": {
            "train": str(corpus / "train.jsonl"),
            "validation": str(corpus / "validation.jsonl"),
            "sequence_length": size.sequence_length,
            "cache_dir": str(folder / "cache"),
            "workers": 2,
        },
        "train": {
            "tokens": tokens,
            "batch_tokens": size.batch_tokens,
            "micro_batch": size.batch_tokens // size.sequence_length,
            "lr": size.lr,
            "warmup": "5%",
            "decay": "30%",
        },
        "run": {"dir": str(folder / name), "validation_tokens": size.validation_tokens, "validate_every": "50%"},
    }


def prepare_corpus(folder: Path, size: DemoSize, say: Say) -> Path:
    """Text and tokenizer under folder/corpus, once."""
    corpus = folder / "corpus"
    if not corpus.is_dir():
        say("gathering the standard library's source files and training a tokenizer on them")
        with atomic_path(corpus) as partial:
            facts = write_corpus(partial)
            train_tokenizer([partial / "train.jsonl"], size.vocabulary, partial / "tokenizer")
        say(
            f"corpus: {facts.files} files, {format_count(facts.characters)} characters, "
            f"{facts.held_out_files} files held out"
        )
    return corpus


def write_architecture(folder: Path, corpus: Path, size: DemoSize) -> Path:
    """A folder with the config and tokenizer of a model that has no weights yet."""
    start = folder / "architecture"
    if not start.is_dir():
        from efficientllm.models.loading import load_tokenizer

        tokenizer = load_tokenizer(str(corpus / "tokenizer"))
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            intermediate_size=size.intermediate,
            max_position_embeddings=size.sequence_length,
            tie_word_embeddings=True,
            initializer_range=size.initializer_range,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with atomic_path(start) as partial:
            config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return start


def print_table(summaries: dict[str, dict[str, Any]], size: DemoSize) -> None:
    """The stages' results, and how fast each model is now; speeds in tokens per second."""
    table = Table(title="The same tokens, the same batches, the same final shape")
    speeds = ("training, tokens/s", "once pruned", "forward pass, tokens/s")
    for name in ("model", "parameters", "validation loss", *speeds, "path"):
        table.add_column(name, justify="left" if name in ("model", "path") else "right", overflow="fold")
    models = {name: Path(summary["result"]["path"]) for name, summary in summaries.items()}
    forward = forward_speeds(models, size.batch_tokens // size.sequence_length, size.sequence_length)
    for name, summary in summaries.items():
        result = summary["result"]
        pruned = speed_once_pruned(models[name].parent)
        table.add_row(
            name,
            format_count(result["parameters"]),
            f"{result['validation_loss']:.3f}",
            f"{summary['tokens'] / summary['seconds']:,.0f}",
            "-" if pruned is None else f"{pruned:,.0f}",
            f"{forward[name]:,.0f}",
            result["path"],
        )
    console().print(table)
