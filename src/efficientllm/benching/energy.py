"""Energy counters of the machine: RAPL of the processor through the kernel's files, NVML of an NVIDIA GPU.

A deviation: elsewhere this package stands on libraries, here it reads the kernel's files itself. pyRAPL's last release
is of 2019 and it knows Intel alone, though AMD's counters lie in the same folder; CodeCarbon and zeus are large for
a few lines. RAPL counts the whole processor, other programs included.
https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

from __future__ import annotations

from pathlib import Path

import torch

from efficientllm.benching.timing import Counter

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """Joules of all processor packages and of their memory (where it has a counter of its own)."""

    def __init__(self, zones: list[Path]) -> None:
        self._zones = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
        self._last = [int(file.read_text()) for file, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        """Counters start again from 0 above their range; two readings must not lie a whole range (minutes) apart."""
        for index, (file, largest) in enumerate(self._zones):
            now = int(file.read_text())
            rise = now - self._last[index]
            self._total += rise if rise >= 0 else rise + largest
            self._last[index] = now
        return self._total / 1e6


def rapl_zones(root: Path = POWERCAP) -> list[Path]:
    """Readable zones named package-N, and dram within them."""
    zones = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            (zone / "energy_uj").read_text()
            (zone / "max_energy_range_uj").read_text()
        except OSError:
            continue
        if name.startswith("package") or name == "dram":
            zones.append(zone)
    return zones


class Nvml:
    """Joules of one GPU board, by its own counter (Volta and later)."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        self.joules()

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def counter_for(device: torch.device, root: Path = POWERCAP) -> tuple[Counter | None, str]:
    """The counter of what computes, and what it counts; or None, and why energy is not measurable here."""
    if device.type == "cpu":
        zones = rapl_zones(root)
        if zones:
            return Rapl(zones), "RAPL: the whole processor, other programs included"
        if any(root.glob("intel-rapl:*")):
            return None, f"the RAPL counters under {root} may not be read by this user"
        return None, f"there is no RAPL counter under {root}"
    try:
        return Nvml(device), "NVML: the whole GPU board"
    except ImportError:
        return None, 'the GPU\'s counter needs pip install "efficientllm[nvml]"'
    except Exception as error:  # pynvml.NVMLError, or a driver whose library lacks the call
        return None, f"the GPU has no counter that NVML reads ({error})"
