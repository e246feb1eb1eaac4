"""The device that a job runs on."""

from __future__ import annotations

import torch

from efficientllm.distributed.ranks import ALONE, World
from efficientllm.errors import UsageError


def choose_device(wanted: str, ranks: World = ALONE) -> torch.device:
    """`auto` takes the GPU where there is one: of several processes, each takes that of its place on its node.

    Raises UsageError for a device that is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world > 1 and wanted.startswith("cuda"):
        if wanted != "cuda" or ranks.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"{ranks.local_world} processes on a node with {torch.cuda.device_count()} GPUs cannot share "
                f"train.device '{wanted}'; start one process a GPU and set it to auto or cpu"
            )
        wanted = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"train.device '{wanted}' is not available here; set it to auto or cpu") from error
    return device
