"""What is measured: from the names on the command line to sources that a runtime loads, checked before any is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from efficientllm.benching.contract import Facts, Settings
from efficientllm.benching.facts import facts_of_config, facts_of_gguf
from efficientllm.errors import UsageError
from efficientllm.export.subject import subject_of
from efficientllm.models.loading import load_config

GGUF = ".gguf"


@dataclass(frozen=True)
class Candidate:
    """A model: as the user names it, what the runtime loads, and what its shape says."""

    name: str
    source: str
    facts: Facts


def candidates(names: list[str], settings: Settings, temporary: Path, say: Callable[[str], None]) -> list[Candidate]:
    """Raises UsageError for the first name that cannot be measured. temporary: an empty folder for GGUF exports."""
    found = []
    for index, name in enumerate(names):
        if settings.backend == "llamacpp":
            source = str(_gguf_of(name, settings, temporary / str(index), say))
            facts = facts_of_gguf(Path(source), settings.prompt, settings.context)
            _check_positions(name, settings, facts.positions)
        else:
            source, dtype = _source_of(name), getattr(torch, settings.dtype)
            facts = facts_of_config(config_of(name, settings), settings.prompt, settings.context, dtype)
        found.append(Candidate(name, source, facts))
    return found


def homes(names: list[str]) -> list[Path]:
    """Folders of the runs among the models, which keep what was measured."""
    subjects = [subject_of(Path(name)) for name in names if Path(name).is_dir()]
    return [subject.folder.parent for subject in subjects if subject.facts is not None]


def config_of(name: str, settings: Settings) -> PretrainedConfig:
    """The configuration of a run's model, a transformers folder or a hub model, whose weights are not needed. Raises
    UsageError for a name that is none, or a model that takes no sequence of the length asked for."""
    config = load_config(_source_of(name), what="model", use="measured")
    _check_positions(name, settings, int(config.max_position_embeddings))
    return config


def _check_positions(name: str, settings: Settings, positions: int) -> None:
    if settings.context > positions:
        raise UsageError(
            f"{name} takes {positions} positions at most; --prompt {settings.prompt} and --generate "
            f"{settings.generate} make {settings.context}: lower one of them"
        )


def _source_of(name: str) -> str:
    """What transformers loads for a run, a transformers folder, a GGUF file (dequantised) or a hub id."""
    path = Path(name)
    if path.is_file() and path.suffix != GGUF:
        raise UsageError(f"{name} is a file; name a run, a transformers folder, a .gguf file or a hub id")
    return str(subject_of(path).folder) if path.is_dir() or path.suffix == GGUF else name


def _gguf_of(name: str, settings: Settings, folder: Path, say: Callable[[str], None]) -> Path:
    """The file itself, or a folder's model exported to one."""
    from efficientllm.export.gguf import GGUFRequest, export_gguf

    path = Path(name)
    if path.suffix == GGUF:
        return path
    kind = settings.dtype.split(" ")[0]  # as checks.llamacpp_dtype has it
    mend = "free disk space there, or set TMPDIR to a folder on a larger disk"
    return export_gguf(GGUFRequest(subject_of(path), kind, folder / "model.gguf", disk_mend=mend), say)
