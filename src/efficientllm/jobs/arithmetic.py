"""What decides on the last bits of a run beside its recipe: on CPUs, how many threads add up and by which kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


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
