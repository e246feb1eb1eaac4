"""What is asked of a measurement, what one run of it gives, and what a runtime must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Settings:
    """One measurement, the same for every model.

    prompt, generate: tokens of a sequence, in and out; the first generated one comes from prefill, the others from
    generate - 1 decode steps. batches: sequences at once, one after another. repeats: counted runs of each batch.
    dtype: of weights and activations (transformers), or the GGUF type that folders are written in (llama.cpp), in words
    where files bring their own.
    """

    prompt: int
    generate: int
    batches: tuple[int, ...]
    repeats: int
    backend: str
    device: str
    dtype: str
    threads: int

    @property
    def context(self) -> int:
        """Positions of a whole sequence."""
        return self.prompt + self.generate


@dataclass(frozen=True)
class Sample:
    """One counted run: seconds of the prompt and of all decode steps, and joules, None where they cannot be had."""

    prefill_seconds: float
    decode_seconds: float
    prefill_joules: float | None = None
    decode_joules: float | None = None


@dataclass(frozen=True)
class Facts:
    """What follows from a model's shape and types alone.

    parameters: tied ones once. weight_bytes: as they lie in memory. prefill_flops: of a prompt token, the mean over the
    prompt. decode_flops: of one token at the end of the context. cache_bytes: keys and values of one whole sequence.
    positions: most that the model takes. type: of the weights, as PyTorch or as llama.cpp calls it.
    """

    parameters: int
    weight_bytes: int
    prefill_flops: float
    decode_flops: int
    cache_bytes: int
    positions: int
    type: str = ""


class Backend(Protocol):
    """A loaded model in one runtime. Only prefill and decode are timed, and return when the device has finished."""

    def begin(self, batch: int) -> None:
        """Makes `batch` sequences ready: prompts of random tokens, the same every time, and an empty cache."""

    def prefill(self) -> None:
        """Processes the prompts and chooses the first token of each sequence, the most likely one."""

    def decode(self, steps: int) -> None:
        """Appends `steps` tokens to each sequence, one at a time; a token that ends a text does not end the run."""

    def end(self) -> None:
        """Frees what `begin` took."""

    def device_peak(self) -> int | None:
        """Most bytes of accelerator memory taken since the model began to load; None where unknown."""
