"""Memory of this process as Linux counts it."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def resident() -> int | None:
    """Bytes of physical memory that the process has now; None where there is no /proc."""
    return _field("VmRSS")


def peak_resident() -> int | None:
    """The most bytes that it ever had. Not getrusage's figure, which a process inherits from the one that starts it."""
    return _field("VmHWM")


def _field(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
