"""Checkpoints: a snapshot as a folder of safetensors under a manifest that says its widths first.

checkpoints/step-00000120/manifest.json      widths, config, counts, pruner facts, size and CRC of each file
                          weights.safetensors, optimizer.safetensors, pruner.safetensors
                          or, of several processes, shard-0000N-model-....safetensors (sharded.py)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from efficientllm import __version__
from efficientllm.checkpoint.sharded import read_shards, size_and_crc, write_shards
from efficientllm.distributed.ranks import ALONE, World, error_of_all
from efficientllm.errors import UsageError
from efficientllm.files import PARTIAL, atomic_path
from efficientllm.models.space import widths_of
from efficientllm.training.snapshot import PREFIXES, Snapshot, check_masks, config_of, counts_of, saved_counts

FORMAT = 1
READABLE = frozenset({FORMAT})
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
ONE_PROCESS = {"weights.safetensors", "optimizer.safetensors", "pruner.safetensors"}
FREE_AND_GO_ON = "earlier checkpoints are whole: free disk space or mend permissions, then run the same command again"
ALWAYS = {"files", "config", "pruner", "step", "tokens", "refresh_tokens"}  # in manifests of every version


def save(folder: Path, snapshot: Snapshot, ranks: World = ALONE) -> Path:
    """Writes folder/step-N; raises UsageError when the disk refuses, with older checkpoints untouched.

    Several processes write their own shards side by side; the folder takes its name once all of them have.
    """
    path = folder / f"step-{snapshot.step:08d}"
    what = f"checkpoint {path}"
    with disk_errors(what, ranks), ExitStack() as stack:
        begin = disk_errors(what)(lambda: stack.enter_context(atomic_path(path)))
        partial = ranks.from_first(begin)
        files = _write_files(partial, snapshot) if ranks.world == 1 else write_shards(partial, _flat(snapshot), ranks)

        @disk_errors(what)
        def finish() -> None:
            manifest = {
                "widths": widths_of(config_of(snapshot)).record(),
                "format": FORMAT,
                "efficientllm": __version__,
                **counts_of(snapshot),
                "flops": asdict(snapshot.flops),
                "config": snapshot.config,
                "pruner": snapshot.pruner_facts,
                "files": files,
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            stack.close()

        ranks.from_first(finish)
    return path


@contextmanager
def disk_errors(what: str, ranks: World = ALONE, mend: str = FREE_AND_GO_ON) -> Iterator[None]:
    """Turns what the disk refuses, to all of these ranks at once, into a UsageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise error_of_all(ranks, f"cannot write {what} ({error}); {mend}") from error


def _flat(snapshot: Snapshot) -> dict[str, Tensor]:
    return snapshot.weights | _flatten(snapshot.moments) | snapshot.pruner_tensors


def _write_files(partial: Path, snapshot: Snapshot) -> dict[str, Any]:
    """One file each for weights, optimizer and pruner; size and CRC of each."""
    tensors = {
        "weights": snapshot.weights,
        "optimizer": _flatten(snapshot.moments),
        "pruner": snapshot.pruner_tensors,
    }
    files = {}
    for name, content in tensors.items():
        file = partial / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in content.items()}, file)
        files[file.name] = size_and_crc(file)
    return files


def load(path: Path, ranks: World = ALONE, device: torch.device | str = "cpu") -> Snapshot:
    """Reads a checkpoint, whatever the number of processes that wrote it; with several, as they keep it.

    Raises UsageError when it is damaged or of a version with another format or other dimensions.
    """
    manifest = ranks.together(lambda: _read_manifest(path))
    names = sorted(manifest["files"])
    ranks.together(lambda: _check_files(path, manifest, names[ranks.rank :: ranks.world]))
    with _reading(path, ranks):
        if ranks.world == 1 and set(names) == ONE_PROCESS:
            # Copied out of the file's memory map: the file may be deleted while the run goes on.
            tensors = {key: value.clone() for name in names for key, value in load_file(path / name).items()}
        else:
            tensors = read_shards(path, ranks, device)
    moments = {key: value for key, value in tensors.items() if "|" in key}
    pruner = {key: value for key, value in tensors.items() if key.startswith(PREFIXES)}
    snapshot = Snapshot(
        config=manifest["config"],
        **saved_counts(manifest),
        weights={key: value for key, value in tensors.items() if key not in moments and key not in pruner},
        moments=_unflatten(moments),
        pruner_tensors=pruner,
        pruner_facts=manifest["pruner"],
    )
    try:
        check_masks(snapshot)
    except ValueError as error:
        versions = f"of efficientllm {manifest['efficientllm']} does not fit this {__version__}"
        raise error_of_all(ranks, f"checkpoint {path} {versions}: {error}") from error
    return snapshot


@contextmanager
def _reading(path: Path, ranks: World = ALONE) -> Iterator[None]:
    """Turns what the disk refuses to give, to all of these ranks at once, into a UsageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise error_of_all(
            ranks,
            f"checkpoint {path} cannot be read ({error}); mend the disk or its permissions and run the same command "
            "again, or delete that folder, and the run goes on from the one before",
        ) from error


def _check_files(path: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        file, known = path / name, manifest["files"][name]
        with _reading(path):
            whole = file.is_file() and file.stat().st_size == known["bytes"] and size_and_crc(file) == known
        if not whole:
            raise UsageError(
                f"checkpoint {path} is damaged ({name} is not as it was written); delete that folder, and the "
                "run goes on from the one before"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        version = int(manifest["format"])
        lacks = ALWAYS - manifest.keys()
        if version in READABLE and lacks:
            raise KeyError(min(lacks))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"checkpoint {path} is damaged (its {MANIFEST} cannot be read); delete that folder, and the run goes on "
            "from the one before"
        ) from error
    if version not in READABLE:
        age, mend = ("newer", " or newer") if version > FORMAT else ("older", "")
        raise UsageError(
            f"checkpoint {path} was written by efficientllm {manifest.get('efficientllm')}, which is {age} than this "
            f"{__version__}, in another format; install that version{mend} to go on"
        )
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def retain(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a kill has left half-written."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(f"{PARTIAL}*")]:
        shutil.rmtree(path, ignore_errors=True)  # one that cannot be removed now is old again next time


def _flatten(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{key}|{name}": value for name, each in moments.items() for key, value in each.items()}


def _unflatten(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {}
    for label, value in flat.items():
        key, name = label.split("|", 1)
        moments.setdefault(name, {})[key] = value
    return moments
