"""Models in llama.cpp itself, for the tests that hold exports against it; they need llama-cpp-python and gguf."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from efficientllm.export.gguf import export_gguf
from efficientllm.export.subject import subject_of

DATA = Path(__file__).parents[3] / "shared" / "data"
F32 = 0  # ggml's number of the type, for an f32 cache of keys and values


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No repacking of weights for AMX: virtual machines that announce those tiles may fault on them."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without() -> Any:
        options = defaults()
        options.use_extra_bufts = False
        return options

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without)


@contextmanager
def runtime(file: Path) -> Iterator[Any]:
    options = {
        "n_ctx": 256,
        "n_batch": 256,
        "n_ubatch": 256,
        "n_threads": 1,
        "n_threads_batch": 1,
        "logits_all": True,
        "verbose": False,
    }
    with closing(llama_cpp.Llama(str(file), type_k=F32, type_v=F32, **options)) as model:
        yield model


def to_gguf(folder: Path, out: Path, kind: str = "f32") -> Path:
    return export_gguf(subject_of(folder), kind, out, say=lambda note: None)
