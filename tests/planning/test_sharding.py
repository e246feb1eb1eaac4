"""What a GPU of several will hold, against what FSDP2 holds: every shard rounded up to whole rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import World, tiny_config
from efficientllm.config import DistributedConfig
from efficientllm.models.space import space_of
from efficientllm.planning.memory import StepMemory
from efficientllm.planning.sharding import sharding_of
from processes import call

STEP = StepMemory(4000, 4000, 8000, 500, 100)


@pytest.mark.parametrize(("shard", "pieces"), [("none", 1), ("full", 4), ("hybrid", 2)])
def test_shards_divide_the_state_and_not_the_activations(shard: str, pieces: int) -> None:
    space = space_of(tiny_config("llama-gqa", num_hidden_layers=4))
    options = {"gpus": 4, "per_node": 8, "device_memory": 10**9, "micro_batches": 3, "bf16": True}
    found = sharding_of(space, STEP, DistributedConfig(shard=shard), **options)  # type: ignore[arg-type]
    assert (found.shards, found.replicas) == (pieces, 4 // pieces)
    assert (found.memory.weights, found.memory.optimizer) == (4000 // pieces, 8000 // pieces)
    assert (found.memory.activations, found.memory.temporary) == (500, 100)
    parameters = int(space.num_params())
    outside = 2 * 61 * 40 + 40  # embedding, LM head, last norm
    ahead = outside + (parameters - outside) // 2  # two of four layers: the one at work and the one that is fetched
    layered = parameters - outside
    assert found.gathered == 4 * outside + 2 * (layered if pieces == 1 else ahead - outside)  # the root in fp32
    assert found.scattered == 4 * outside + 6 * layered // 4
    assert found.total == found.memory.total + found.gathered + found.scattered
    scattered = (8 * layered + 8 * outside) * (pieces - 1) // pieces * 3
    assert found.sent == scattered + 2 * (parameters // pieces) * 4 * (4 // pieces - 1) // (4 // pieces)


def test_gpu_hours_do_not_depend_on_their_number(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*options: str) -> dict[str, object]:
        assert call("plan", recipe, "--gpu", "l4-24gb", "--json", *options) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    recipe: Path = world.write("planned-for-many")
    one, four = planned(), planned("--gpus", "4")
    assert one["gpu_hours"] == four["gpu_hours"] == pytest.approx(4 * four["hours"])  # type: ignore[operator]
    assert four["sharding"]["replicas"] == 4  # type: ignore[index]
    assert call("plan", recipe, "--gpu", "l4-24gb", "--gpus", "3") == 2
    assert "does not divide over 3 GPUs" in capsys.readouterr().err
