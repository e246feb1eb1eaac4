"""Energy counters of the machine: RAPL of the processor through the kernel's files, NVML of an NVIDIA GPU.

RAPL counts the whole processor. https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

Joules = Callable[[], float]  # energy since some moment; it only grows
POWERCAP = Path("/sys/class/powercap")


def rapl(zones: list[Path]) -> Joules:
    """Of all these zones together. A counter starts again from 0 above its range: two readings must not lie a whole
    range (minutes) apart."""
    files = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
    last = [int(file.read_text()) for file, _ in files]
    total = 0

    def joules() -> float:
        nonlocal total
        for index, (file, largest) in enumerate(files):
            now = int(file.read_text())
            total += now - last[index] + (largest if now < last[index] else 0)
            last[index] = now
        return total / 1e6

    return joules


def rapl_zones(root: Path = POWERCAP) -> list[Path]:
    """Readable zones named package-N, and dram within them: the processors and their memory."""
    zones = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name, *_ = [(zone / file).read_text().strip() for file in ("name", "energy_uj", "max_energy_range_uj")]
        except OSError:
            continue
        if name.startswith("package") or name == "dram":
            zones.append(zone)
    return zones


def counter_for(device: torch.device, root: Path = POWERCAP) -> tuple[Joules | None, str]:
    """The counter of what computes, and what it counts; or None, and why energy is not measurable here."""
    if device.type == "cpu":
        if zones := rapl_zones(root):
            return rapl(zones), "RAPL: the whole processor, other programs included"
        there = any(root.glob("intel-rapl:*"))
        return None, f"the RAPL counters under {root} may not be read" if there else f"no RAPL counter is under {root}"
    try:
        import pynvml

        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(board)  # of Volta and later
    except ImportError:
        return None, 'the GPU\'s counter needs pip install "efficientllm[nvml]"'
    except Exception as error:  # pynvml.NVMLError, or a driver whose library lacks the call
        return None, f"the GPU has no counter that NVML reads ({error})"
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(board)) / 1e3, "NVML: the whole GPU board"
