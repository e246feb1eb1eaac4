"""A small recipe as a file, read with overrides, and what is said of a bad one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from efficientllm.config import Recipe, load_recipe
from efficientllm.errors import UsageError

BASE = """
source: org/model
data: {train: [a.txt], sequence_length: 1024}
train: {tokens: 60M, batch_tokens: 32K, lr: 1.5e-3}
prune: {target: 469M}
run: {dir: runs/x}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    def load(*overrides: str, text: str = BASE, name: str = "recipe.yaml") -> Recipe:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load


@pytest.fixture
def refusal(load: Callable[..., Recipe]) -> Callable[..., str]:
    """The message of a refused recipe; always one line."""

    def refusal(*overrides: str, **more: str) -> str:
        with pytest.raises(UsageError) as error:
            load(*overrides, **more)
        message = str(error.value)
        assert "\n" not in message
        assert "pydantic" not in message
        return message

    return refusal
