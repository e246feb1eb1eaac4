"""Writing a model folder as GGUF and reading it back, for the tests of exports; they need the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from efficientllm.export.gguf import export_gguf
from efficientllm.export.subject import subject_of

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write(folder: Path, kind: str = "f32", **options: Any) -> tuple[Any, list[str]]:
    """Exports beside the folder; the file's reader and what was said."""
    said: list[str] = []
    out = options.pop("out", folder.parent / f"{kind}.gguf")
    path = export_gguf(subject_of(folder), kind, out, **options, say=said.append)
    return gguf.GGUFReader(path), said


def field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()
