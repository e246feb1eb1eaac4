"""Checkpoints: a snapshot as a folder of safetensors under a manifest that says its widths first.

checkpoints/step-00000120/manifest.json      widths, config, counts, pruner facts, size and CRC of each file
                          weights.safetensors, optimizer.safetensors, pruner.safetensors
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from efficientllm import __version__
from efficientllm.checkpoint.files import PARTIAL, appearing
from efficientllm.errors import UsageError
from efficientllm.models.space import widths_of
from efficientllm.training.state import COUNTS, Snapshot, config_of

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
CHUNK = 1 << 24
# Counts that manifests of earlier versions lack: a sum whose beginning was not counted stays unknown.
EARLIER = {"flops": math.nan, "skipped_steps": 0, "skipped_in_a_row": 0}


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Writes folder/step-N; raises UsageError when the disk refuses, with older checkpoints untouched."""
    path = folder / f"step-{snapshot.step:08d}"
    tensors = {
        "weights": snapshot.weights,
        "optimizer": _flatten(snapshot.moments),
        "pruner": snapshot.pruner_tensors,
    }
    try:
        with appearing(path) as partial:
            files = {}
            for name, content in tensors.items():
                file = partial / f"{name}.safetensors"
                save_file({key: value.contiguous() for key, value in content.items()}, file)
                files[file.name] = {"bytes": file.stat().st_size, "crc32": _crc(file)}
            manifest = _manifest(snapshot) | {"files": files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write checkpoint {path} ({error}); earlier checkpoints are whole: free disk space or mend "
            "permissions, then run the same command again"
        ) from error
    return path


def _manifest(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "widths": asdict(widths_of(config_of(snapshot))),
        "format": FORMAT,
        "efficientllm": __version__,
        **{name: getattr(snapshot, name) for name in COUNTS},
        "config": snapshot.config,
        "pruner": snapshot.pruner_facts,
    }


def load(path: Path) -> Snapshot:
    """Reads a checkpoint. Raises UsageError when it is damaged or from a newer version."""
    manifest = _read_manifest(path)
    content: dict[str, dict[str, Tensor]] = {}
    for name in ("weights", "optimizer", "pruner"):
        file = path / f"{name}.safetensors"
        facts = manifest["files"][file.name]
        if not file.is_file() or file.stat().st_size != facts["bytes"] or _crc(file) != facts["crc32"]:
            raise UsageError(
                f"checkpoint {path} is damaged ({file.name} is not as it was written); delete that folder, and the "
                "run goes on from the one before"
            )
        # Copied out of the file's memory map: the file may be deleted while the run goes on.
        content[name] = {key: value.clone() for key, value in load_file(file).items()}
    counts: dict[str, Any] = {name: manifest.get(name, EARLIER.get(name)) for name in COUNTS}
    return Snapshot(
        config=manifest["config"],
        **counts,
        weights=content["weights"],
        moments=_unflatten(content["optimizer"]),
        pruner_tensors=content["pruner"],
        pruner_facts=manifest["pruner"],
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        version = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"checkpoint {path} is damaged (its {MANIFEST} cannot be read); delete that folder, and the run goes on "
            "from the one before"
        ) from error
    if version > FORMAT:
        raise UsageError(
            f"checkpoint {path} was written by efficientllm {manifest.get('efficientllm')}, which is newer than this "
            f"{__version__}; install that version or newer to go on"
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


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
