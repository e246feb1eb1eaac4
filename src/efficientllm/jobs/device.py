"""The device that a job runs on, and what decides on its last bits: kernels, and on CPUs how many threads add up."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from efficientllm.distributed.ranks import ALONE, World
from efficientllm.errors import UsageError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


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
        raise UsageError(
            f"device '{wanted}' is not available here; set train.device, or --device of a command, to auto or cpu"
        ) from error
    return device


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While the body runs, PyTorch takes only kernels that give the same bits every time, and fails where it has none.

    cuBLAS reads its variable when it starts, so the body is to be entered before a GPU multiplies anything; a value
    that the user has set is left.
    """
    if not wanted:
        yield
        return
    set_before, mode = os.environ.get(CUBLAS), torch.get_deterministic_debug_mode()
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        if set_before is None:
            del os.environ[CUBLAS]


def arithmetic(device: torch.device) -> dict[str, Any]:
    """Threads and vector instructions of this process, for source.json; nothing where a GPU computes."""
    if device.type != "cpu":
        return {}
    return {"threads": torch.get_num_threads(), "cpu_kernels": torch.backends.cpu.get_cpu_capability()}


def other_bits(began: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A sentence on each way in which this process may round otherwise than the one that began the run.

    began: source.json; one of an earlier version says nothing of it. Nothing is set here: the user may have reasons.
    """
    found = []
    threads, kernels = (began.get(key, here.get(key)) for key in ("threads", "cpu_kernels"))
    if threads != here.get("threads"):
        found.append(
            f"{here.get('threads')} threads, where the run began with {threads}: the last bits may differ; set "
            f"OMP_NUM_THREADS={threads}"
        )
    if kernels != here.get("cpu_kernels"):
        found.append(
            f"CPU kernels for {here.get('cpu_kernels')}, where the run began with those for {kernels}: the last bits "
            "may differ; go on with a machine like the first"
        )
    return found
