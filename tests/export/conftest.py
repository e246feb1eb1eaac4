"""Model folders with a tokenizer, and one finished run with a ladder, that the tests of exports share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from conftest import World, tiny_model
from efficientllm.cli import main

Maker = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture
def make_model(world: World, tmp_path: Path) -> Maker:
    """A folder with a tiny model of a family and a tokenizer (default: a byte-level BPE of 300), and the model."""

    def make(family: str, tokenizer: Path | None = None, **changes: object) -> tuple[Path, PreTrainedModel]:
        folder = tmp_path / f"a-{family}"
        model = tiny_model(family, **({"vocab_size": 300, "max_position_embeddings": 256} | changes)).eval()
        model.save_pretrained(folder)
        for file in (tokenizer or world.folder / "tokenizer").glob("tokenizer*"):
            shutil.copy(file, folder / file.name)
        return folder, model

    return make


@pytest.fixture(scope="session")
def finished_run(world: World) -> Path:
    """A run of the tiny world that left one size on its ladder."""
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(world.write("exported", prune={"target": "50%", "ladder": ["75%"]}))])
    assert stop.value.code == 0
    return world.folder / "runs" / "exported"
