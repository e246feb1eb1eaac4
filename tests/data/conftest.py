"""Rows of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data.corpus_samples import load_path
from efficientllm.data.corpus import Corpus


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[list[Corpus], list[Corpus]]]:
    """load_path with a cache of the test's own."""
    return partial(load_path, tmp_path / "cache")
