"""What a teacher says, as draws on disk: taken once for each row of text, read back by every run that meets it again.

teacher-DIGEST/keys.bin      16 bytes a row: a digest of its tokens
               log_p.bin     fp16 (rows, length, samples), log-probabilities of what was drawn
               tokens.bin    int32 (rows, length, samples), the vocabulary entries that were drawn

Files only grow, each flushed before the next and keys last, so that a torn row has no key. One process writes; others
read what there was when they began, and ask the teacher for the rest.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import PreTrainedModel

from efficientllm.errors import UsageError
from efficientllm.models.flops import forward_flops, teacher_flops
from efficientllm.pruning.groups import Space
from efficientllm.training.distillation import draws, sampled_divergence
from efficientllm.training.gradient import model_inputs

FORMAT = 1  # stands in a folder's name: a new number makes old ones invisible
KEY_BYTES = 16
PART = 256  # tokens whose distributions stand in memory in fp64


class CachedTeacher:
    """A Teacher (distillation.py) that keeps draws of every token's distribution on disk.

    load: brings the model when a row is not there yet, and never before. length: tokens of a row. samples: draws of a
    token. space: the model's. Raises UsageError when the disk refuses at first.
    """

    def __init__(
        self,
        folder: Path,
        load: Callable[[], PreTrainedModel],
        *,
        length: int,
        samples: int,
        space: Space,
    ) -> None:
        self._load, self._length, self._samples, self._space = load, length, samples, space
        self._model: PreTrainedModel | None = None
        self._paths = [folder / name for name in ("log_p.bin", "tokens.bin", "keys.bin")]
        self._sizes = [length * samples * 2, length * samples * 4, KEY_BYTES]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            try:
                self._lock.acquire(timeout=0)
                self._writes = True
            except Timeout:
                self._writes = False
            self._places = self._read_keys()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> UsageError:
        return UsageError(
            f"cannot use the cache of the teacher's draws in {self._paths[0].parent} ({error.strerror}); make room, "
            "set data.cache_dir to a larger disk, or leave out distill.samples"
        )

    def _read_keys(self) -> dict[bytes, int]:
        """Place of each whole row; the writer cuts off what a kill has left half-written."""
        rows = 0
        if all(path.exists() for path in self._paths):
            rows = min(path.stat().st_size // size for path, size in zip(self._paths, self._sizes, strict=True))
        if self._writes:
            for path, size in zip(self._paths, self._sizes, strict=True):
                with path.open("ab") as file:
                    file.truncate(rows * size)
        raw = self._paths[2].read_bytes() if rows else b""
        return {raw[place * KEY_BYTES : (place + 1) * KEY_BYTES]: place for place in range(rows)}

    @torch.no_grad()
    def says(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Log-probabilities of the draws, fp32 (tokens, samples), and their vocabulary entries, int64."""
        keys = [hashlib.blake2b(row.numpy().tobytes(), digest_size=KEY_BYTES).digest() for row in rows.cpu()]
        missing = [place for place, key in enumerate(keys) if key not in self._places]
        fresh: dict[bytes, tuple[Tensor, Tensor]] = {}
        if missing:
            fresh = {keys[at]: self._ask(rows[at], keys[at]) for at in missing}
            if self._writes:
                self._append(fresh)
        parts = [fresh[key] if key in fresh else self._read(self._places[key]) for key in keys]
        said = (torch.stack([part[which] for part in parts]).flatten(0, 1).to(rows.device) for which in (0, 1))
        log_p, tokens = said
        return log_p.float(), tokens.long()

    def _ask(self, row: Tensor, key: bytes) -> tuple[Tensor, Tensor]:
        """One row's draws, fp16 and int32, on the CPU: its own logits alone stand in memory. The row seeds them."""
        if self._model is None:
            self._model = self._load()
        model: Any = self._model
        logits = model(**model_inputs(row[None])).logits[0]
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        offset = torch.rand(len(row), generator=generator, dtype=torch.float64).to(logits.device)
        parts = zip(logits.split(PART), offset.split(PART), strict=True)
        log_p, tokens = zip(*(draws(part, self._samples, at) for part, at in parts), strict=True)
        return torch.cat(log_p).half().cpu(), torch.cat(tokens).int().cpu()

    def _append(self, fresh: dict[bytes, tuple[Tensor, Tensor]]) -> None:
        """Nothing more is written once the disk refuses: training needs the teacher's words, not their copies."""
        content = (
            b"".join(log_p.numpy().tobytes() for log_p, _ in fresh.values()),
            b"".join(tokens.numpy().tobytes() for _, tokens in fresh.values()),
            b"".join(fresh),
        )
        try:
            for path, part in zip(self._paths, content, strict=True):
                with path.open("ab") as file:
                    file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:  # what it wrote of these rows has no key; the next writer cuts it off
            self._writes = False
            print(f"warning: {self._refused(error)}; the teacher is asked on", file=sys.stderr, flush=True)
            return
        for key in fresh:
            self._places[key] = len(self._places)

    def _read(self, place: int) -> tuple[Tensor, Tensor]:
        shape = (self._length, self._samples)
        parts = []
        for path, size, kind in zip(self._paths[:2], self._sizes, (np.float16, np.int32), strict=False):
            with path.open("rb") as file:
                file.seek(place * size)
                parts.append(torch.from_numpy(np.frombuffer(file.read(size), dtype=kind).reshape(shape).copy()))
        return parts[0], parts[1]

    def divergence(self, own: Tensor, *said: Tensor) -> Tensor:
        return sampled_divergence(own, *said)

    def flops(self, rows: int, length: int) -> int:
        return teacher_flops(forward_flops(self._space, rows, length), keeps=True)
