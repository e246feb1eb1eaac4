"""A run remembers by what its last bits were made, and says once where they will be made otherwise."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import World
from efficientllm.cli import main
from efficientllm.jobs.arithmetic import arithmetic, other_bits


def test_what_differs_is_said_and_nothing_else() -> None:
    here = arithmetic(torch.device("cpu"))
    assert here == {"threads": torch.get_num_threads(), "cpu_kernels": torch.backends.cpu.get_cpu_capability()}
    assert arithmetic(torch.device("cuda")) == {}
    assert other_bits(here, here) == other_bits({}, here) == other_bits({}, {}) == []
    threads, kernels = other_bits({"threads": 64, "cpu_kernels": "MINE"}, here)
    assert threads.startswith(f"{here['threads']} threads, where the run began with 64: the last bits may differ")
    assert threads.endswith("OMP_NUM_THREADS=64")
    assert "began with those for MINE" in kernels


def test_a_resumed_run_says_that_it_began_with_other_threads(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = world.write("threads", train={"tokens": 1024}), world.folder / "runs" / "threads"
    with pytest.raises(SystemExit):
        main(["prune", str(recipe)])
    source = json.loads((folder / "source.json").read_text())
    assert source["threads"] == torch.get_num_threads()
    (folder / "summary.json").unlink()
    (folder / "source.json").write_text(json.dumps(source | {"threads": 64}))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["prune", str(recipe)])
    said = capsys.readouterr().err
    assert said.count("where the run began with 64: the last bits may differ") == 1
    assert "CPU kernels" not in said
