"""A run that nobody disturbed, for the tests of jobs that hold others against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import World
from efficientllm.reporting.plots import plot_run
from processes import call


@pytest.fixture(scope="session")
def finished(world: World) -> Path:
    """The folder of a finished run at the world's recipe, with its picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efficientllm.jobs.finish.plot_run", plot_run)
        assert call("prune", world.write("calm")) == 0
    return world.folder / "runs" / "calm"
