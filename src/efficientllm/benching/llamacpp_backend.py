"""A GGUF file in llama.cpp, through the C interface of llama-cpp-python, whose Llama class knows no batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import llama_cpp
import numpy as np

from efficientllm.benching.settings import Settings
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

    def run(self, batch: int) -> Iterator[list[Any]]:
        """As process.measure takes it: random prompts, the same for every run of a batch, then (batch) tokens twice."""
        length = self._settings.prompt
        prompts = np.random.default_rng(batch).integers(self._vocabulary, size=(batch, length)).tolist()
        context = self._context(batch)
        whole = _batch(
            (row, position, token, position == length - 1)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        )
        following = _batch((row, 0, 0, True) for row in range(batch))
        try:
            yield prompts
            last = self._compute(context, whole)
            yield last
            for position in range(length, self._settings.context - 1):
                for row, token in enumerate(last):
                    following.token[row], following.pos[row] = token, position
                last = self._compute(context, following)
            yield last
        finally:
            llama_cpp.llama_batch_free(whole)
            llama_cpp.llama_batch_free(following)
            llama_cpp.llama_free(context)

    def _context(self, batch: int) -> Any:
        settings = self._settings
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = batch * settings.context, batch
        options.n_batch, options.n_ubatch = batch * settings.prompt, min(batch * settings.prompt, PHYSICAL_BATCH)
        options.n_threads = options.n_threads_batch = settings.threads
        options.offload_kqv = options.op_offload = settings.device == "gpu"
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise UsageError(f"llama.cpp cannot make a context of {batch} x {settings.context} tokens; lower --batch")
        return context

    def _compute(self, context: Any, batch: Any) -> list[int]:
        """The most likely next token of every sequence. Reading logits waits for the device."""
        code = llama_cpp.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        wanted = (index for index in range(batch.n_tokens) if batch.logits[index])
        rows = (llama_cpp.llama_get_logits_ith(context, index) for index in wanted)
        return [int(np.ctypeslib.as_array(row, shape=(self._vocabulary,)).argmax()) for row in rows]


def _batch(entries: Iterable[tuple[int, int, int, bool]]) -> Any:
    """From (sequence, position, token, whether its logits are wanted)."""
    every = list(entries)
    batch = llama_cpp.llama_batch_init(len(every), 0, 1)
    batch.n_tokens = len(every)
    for index, (row, position, token, wanted) in enumerate(every):
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
    return batch
