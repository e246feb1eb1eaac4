"""What is measured: from the names on the command line to sources that a runtime loads, checked before any is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from efficientllm.benching.contract import Facts, Settings
from efficientllm.benching.facts import facts_of_config, facts_of_gguf
from efficientllm.errors import UsageError

GGUF = ".gguf"


@dataclass(frozen=True)
class Candidate:
    """A model: as the user names it, what the runtime loads, and what its shape says."""

    name: str
    source: str
    facts: Facts


def check_extra(backend: str) -> None:
    """Raises UsageError where the packages of llama.cpp are missing."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if backend == "llamacpp" and missing:
        raise UsageError(
            '--backend llamacpp needs llama-cpp-python and gguf: pip install "efficientllm[llamacpp]" '
            f"({missing[0]} is not installed)"
        )


def candidates(names: list[str], settings: Settings, temporary: Path, say: Callable[[str], None]) -> list[Candidate]:
    """Raises UsageError for the first name that cannot be measured. temporary: an empty folder for GGUF exports."""
    found = []
    for index, name in enumerate(names):
        if settings.backend == "llamacpp":
            source = _gguf_of(name, settings, temporary / str(index), say)
            facts = facts_of_gguf(source, settings.prompt, settings.context)
            candidate = Candidate(name, str(source), facts)
        else:
            candidate = _transformers_candidate(name, settings)
        _check_positions(name, settings, candidate.facts.positions)
        found.append(candidate)
    return found


def homes(names: list[str]) -> list[Path]:
    """Folders of the runs among the models, which keep what was measured."""
    from efficientllm.export.subject import subject_of

    folders = [Path(name) for name in names if Path(name).is_dir()]
    subjects = [subject_of(folder) for folder in folders]
    return [subject.folder.parent for subject in subjects if subject.facts is not None]


def config_of(name: str, settings: Settings) -> PretrainedConfig:
    """The configuration of a run's model, a transformers folder or a hub model, whose weights are not needed. Raises
    UsageError for a name that is none, or a model that takes no sequence of the length asked for."""
    from efficientllm.models.loading import load_config

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
    """What transformers loads for a run, a transformers folder, a GGUF file (dequantised) or a hub id.

    Raises UsageError for another file.
    """
    from efficientllm.export.subject import subject_of

    path = Path(name)
    if path.is_file() and path.suffix != GGUF:
        raise UsageError(f"{name} is a file; name a run, a transformers folder, a .gguf file or a hub id")
    return str(subject_of(path).folder) if path.is_dir() or path.suffix == GGUF else name


def _transformers_candidate(name: str, settings: Settings) -> Candidate:
    from efficientllm.models.loading import load_config

    source = _source_of(name)
    config = load_config(source, what="model", use="measured")
    facts = facts_of_config(config, settings.prompt, settings.context, getattr(torch, settings.dtype))
    return Candidate(name, source, facts)


def _gguf_of(name: str, settings: Settings, folder: Path, say: Callable[[str], None]) -> Path:
    """The file itself, or a folder's model exported to one."""
    from efficientllm.export.gguf import GGUFRequest, export_gguf
    from efficientllm.export.subject import subject_of

    path = Path(name)
    if path.suffix == GGUF:
        if not path.is_file():
            raise UsageError(f"there is no file {name}")
        return path
    kind = settings.dtype.split(" ")[0]  # as checks.llamacpp_dtype has it
    mend = "free disk space there, or set TMPDIR to a folder on a larger disk"
    return export_gguf(GGUFRequest(subject_of(path), kind, folder / "model.gguf", disk_mend=mend), say)
