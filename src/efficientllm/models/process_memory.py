"""Memory of this process as Linux counts it, and what to say where there is none left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from efficientllm.errors import UsageError

STATUS = Path("/proc/self/status")


def resident() -> int | None:
    """Bytes of physical memory that the process has now; None where there is no /proc."""
    return _field("VmRSS")


def peak_resident() -> int | None:
    """The most bytes that it ever had. Not getrusage's figure, which a process inherits from the one that starts it."""
    return _field("VmHWM")


@contextmanager
def memory_in_a_sentence(problem: str, mend: str) -> Iterator[None]:
    """Turns running out of memory into a UsageError."""
    try:
        yield
    except Exception as error:
        if lacks_memory(error) or lacks_memory(error.__cause__):  # load_model has it as the cause of its own sentence
            raise UsageError(f"{problem}; {mend}") from error
        raise


def lacks_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: of a GPU, of Python, or of PyTorch on the processor, which has no type of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "enough memory" in str(error))


def _field(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
