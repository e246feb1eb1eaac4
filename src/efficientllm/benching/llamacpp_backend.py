"""A GGUF file in llama.cpp, through the C interface of llama-cpp-python, whose Llama class knows no batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import llama_cpp
import numpy as np

from efficientllm.benching.contract import Settings
from efficientllm.errors import UsageError

PHYSICAL_BATCH = 512  # most tokens of one graph, as llama-bench has them
ALL_LAYERS = 10_000
ERROR = 4  # ggml's log levels


@llama_cpp.llama_log_callback
def _errors_only(level: int, text: bytes, data: Any) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaCppBackend:
    """Raises UsageError where llama.cpp refuses the file, or a context of the size asked for."""

    def __init__(self, source: str, settings: Settings) -> None:
        self._settings = settings
        llama_cpp.llama_log_set(_errors_only, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = ALL_LAYERS if settings.device == "gpu" else 0
        self._model: Any = llama_cpp.llama_model_load_from_file(source.encode(), options)
        if not self._model:
            raise UsageError(f"llama.cpp cannot load {source}; its own messages are above")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._prompt: Any = None  # all prompts as one batch, and the next token of each sequence
        self._next: Any = None
        self._position = 0
        self.last: list[int] = []  # the latest token of each sequence

    def begin(self, batch: int) -> None:
        settings = self._settings
        length = settings.prompt
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = batch * settings.context, batch
        options.n_batch, options.n_ubatch = batch * length, min(batch * length, PHYSICAL_BATCH)
        options.n_threads = options.n_threads_batch = settings.threads
        options.offload_kqv = options.op_offload = settings.device == "gpu"
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise UsageError(f"llama.cpp cannot make a context of {batch} x {settings.context} tokens; lower --batch")
        self._prompt = _batch(
            (row, position, token, position == length - 1)
            for row, prompt in enumerate(self.prompts(batch))
            for position, token in enumerate(prompt)
        )
        self._next = _batch((row, 0, 0, True) for row in range(batch))

    def prompts(self, batch: int) -> list[list[int]]:
        """Random tokens, the same ones for every run of a batch: (batch, prompt)."""
        shape = (batch, self._settings.prompt)
        tokens: list[list[int]] = np.random.default_rng(batch).integers(self._vocabulary, size=shape).tolist()
        return tokens

    def prefill(self) -> None:
        self._compute(self._prompt)
        self._position = self._settings.prompt

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            for row, token in enumerate(self.last):
                self._next.token[row], self._next.pos[row] = token, self._position
            self._compute(self._next)
            self._position += 1

    def end(self) -> None:
        for batch in (self._prompt, self._next):
            if batch is not None:
                llama_cpp.llama_batch_free(batch)
        if self._context:
            llama_cpp.llama_free(self._context)
        self._prompt = self._next = self._context = None

    def device_peak(self) -> int | None:
        return None

    def _compute(self, batch: Any) -> None:
        """Keeps the most likely token of every sequence. Reading logits waits for the device."""
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        wanted = (index for index in range(batch.n_tokens) if batch.logits[index])
        rows = (llama_cpp.llama_get_logits_ith(self._context, index) for index in wanted)
        self.last = [int(np.ctypeslib.as_array(row, shape=(self._vocabulary,)).argmax()) for row in rows]


def _batch(entries: Iterable[tuple[int, int, int, bool]]) -> Any:
    """From (sequence, position, token, whether its logits are wanted)."""
    every = list(entries)
    batch = llama_cpp.llama_batch_init(len(every), 0, 1)
    batch.n_tokens = len(every)
    for index, (row, position, token, wanted) in enumerate(every):
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
    return batch
