"""What is exported: the model folder behind a run, a size of its ladder, or a folder, what is known of it,
and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from efficientllm import __version__
from efficientllm.errors import UsageError
from efficientllm.files import read_json
from efficientllm.models.loading import load_tokenizer, located
from efficientllm.models.space import head_dim_of, widths_of
from efficientllm.reporting.evaluation_table import known_results
from efficientllm.reporting.journal import read_journal
from efficientllm.reporting.model_card import Card, license_of


@dataclass(frozen=True)
class Subject:
    """A model folder and where it comes from.

    `home` is the folder that takes exports for which no place was named; `facts` is what write_model_card takes
    (None for a model that no run here has made); `results` what an evaluation has measured, as it lies in
    eval/results.json (nothing where there is none, or where it cannot be read).
    """

    folder: Path
    name: str
    home: Path
    facts: dict[str, Any] | None = None
    results: Any = None

    def card(self, config: PretrainedConfig, parameters: int, licence: str | None = None) -> Card:
        """What an export says of its model. licence: as the user states it; else as the model's or its source's own
        card does, None where nobody does."""
        source = (self.facts or {}).get("source", {}).get("path")
        licence = licence or license_of(self.folder) or (license_of(source) if source else None)
        versions = {"efficientllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
        shape = (
            f"a {config.model_type} of {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {heads} of "
            f"{head_dim_of(config)}, {_ffn(config)}, a vocabulary of {config.vocab_size:,}"
        )
        run = versions | self.facts if self.facts else None
        return Card(parameters, run, licence, self.results, self.name, shape)


def _ffn(config: PretrainedConfig) -> str:
    counts = widths_of(config).counts()
    if "experts" not in counts:
        return f"{counts['intermediate']} FFN channels"
    experts, used = counts["experts"], config.num_experts_per_tok
    return f"{experts} experts of {counts['expert_intermediate']} FFN channels ({used} of them a token)"


def subject_of(path: Path) -> Subject:
    """Finds the model behind a path: RUN, RUN/model, RUN/ladder/SIZE (or its model), a model folder, a GGUF file.

    Raises UsageError for a path that is none of these, and for a run that has not finished.
    """
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return Subject(Path(located(str(path), "model")), path.stem, Path.cwd())
    if not path.is_dir():
        raise UsageError(
            f"{path} is no folder; name a run, a size of its ladder (RUN/ladder/469M) or a model folder (a model of "
            "the hub comes with `hf download ORG/NAME --local-dir FOLDER`)"
        )
    path = path.resolve()
    if path.name == "model" and ((path.parent / "summary.json").is_file() or _is_milestone(path.parent)):
        path = path.parent
    if _is_milestone(path):
        return _milestone(path)
    if (path / "summary.json").is_file() and (path / "model").is_dir():
        return Subject(path / "model", path.name, path, _facts(path / "summary.json"), _results(path))
    if (path / "config.json").is_file():
        return Subject(path, path.name, Path.cwd(), None, _results(path))
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        raise UsageError(_unfinished(path))
    raise UsageError(f"{path} holds neither a run nor a model: there is no summary.json and no config.json in it")


def tokenizer_of(folder: Path, say: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """Says so where transformers cuts text otherwise than the folder's tokenizer.json: some of its classes build their
    pre-tokenizer anew. What transformers does counts, since that is how training here has read its text."""
    tokenizer = load_tokenizer(str(folder), what="model")
    backend, file = getattr(tokenizer, "backend_tokenizer", None), folder / "tokenizer.json"
    if backend is not None and file.is_file():
        loaded, there = json.loads(backend.to_str()), json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key in ("normalizer", "pre_tokenizer") if loaded[key] != there.get(key)]
        if differing:
            say(
                f"transformers {transformers.__version__} loads this tokenizer as {type(tokenizer).__name__}, with "
                f"another {' and '.join(differing)} than its tokenizer.json has; the export follows transformers"
            )
    return tokenizer


def _unfinished(run: Path) -> str:
    left = [size for size in (run / "ladder").glob("*") if (size / "model" / "config.json").is_file()]
    if not left:
        return f"run {run} has not finished; let the command that began it go on to its end first"
    latest = min(left, key=lambda size: float((_json(size / "summary.json") or {}).get("parameters", "inf")))
    return (
        f"run {run} has not finished; export its latest size, {latest}, or let the command that began it go on to its "
        "end first"
    )


def _is_milestone(folder: Path) -> bool:
    """Whether it lies where jobs/ladder.py leaves its sizes; a recipe may stand beside a model of any other folder."""
    return folder.parent.name == "ladder" and (folder / "recipe.yaml").is_file() and (folder / "model").is_dir()


def _facts(file: Path) -> dict[str, Any] | None:
    """A run's summary; None for a file of that name that is something else, of which no card can be written."""
    content = _json(file)
    if content is None or not _has(content, "tokens", "events", "compactions", "seconds", "recipe"):
        return None
    known = _is_source(content.get("source")) and _has(content.get("result"), "parameters", "widths")
    return content if known else None


def _has(content: Any, *keys: str) -> bool:
    return isinstance(content, dict) and all(key in content for key in keys)


def _is_source(content: Any) -> bool:
    return _has(content, "path", "parameters", "widths")


def _milestone(folder: Path) -> Subject:
    """A size that a run has left on its way; what the run's journals say up to then makes up its facts."""
    run = folder.parent.parent
    left, source = _json(folder / "summary.json"), _json(run / "source.json")
    facts = None
    known = _has(left, "step", "tokens", "parameters", "widths") and _is_source(source)
    if left and known and (run / "config.yaml").is_file():
        step = left["step"]
        until = {
            name: [record for record in read_journal(run / f"{name}.jsonl") if record["step"] <= step]
            for name in ("metrics", "events", "compactions")
        }
        facts = {
            "source": source,
            "result": {key: left[key] for key in RESULT if key in left},
            "tokens": left["tokens"],
            "events": len(until["events"]),
            "compactions": len(until["compactions"]),
            "seconds": sum(record["seconds"] for record in until["metrics"]),
            "recipe": (run / "config.yaml").read_text(encoding="utf-8"),
        }
    return Subject(folder / "model", f"{run.name}-{folder.name}", run, facts, _results(folder))


RESULT = ("parameters", "widths", "validation_loss", "validation_bits_per_byte", "vocabulary")


def _results(folder: Path) -> dict[str, Any]:
    return known_results(folder / "eval" / "results.json")


def _json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or something else."""
    content = read_json(file, "restore it, or export the model folder beside it")
    return content if isinstance(content, dict) else None
