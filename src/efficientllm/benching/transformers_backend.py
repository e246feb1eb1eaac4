"""A model in transformers and PyTorch: the model's own forward with its dynamic cache, greedy, without generate().

It computes with as many threads as the process has; `timing.threads` sets them.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from efficientllm.benching.contract import Settings
from efficientllm.models.loading import load_model
from efficientllm.models.space import build


def rehearse(settings: Settings) -> None:
    """Loads and runs a Llama of a few hundred weights: what transformers and PyTorch import and set up when a model is
    first used (some 150 MB) is none of the measured model's memory.
    """
    shape: dict[str, Any] = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as folder:
        build(LlamaConfig(**shape)).save_pretrained(folder)
        tiny = TransformersBackend(folder, replace(settings, prompt=2, generate=2))
        tiny.begin(1)
        tiny.prefill()
        tiny.decode(1)
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats(settings.device)


class LoadedModel:
    """A model that is on its device, in its dtype."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self._device = torch.device(settings.device)
        self._prompt = settings.prompt
        self.model: Any = model.eval()
        self.cache: Any = None  # transformers' DynamicCache of the run under way
        self._tokens = torch.empty(0)  # (batch, prompt) before prefill, then the last ones, (batch, 1)

    def begin(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, self._prompt)
        tokens = torch.randint(self.model.config.vocab_size, shape, generator=generator)
        self._tokens, self.cache = tokens.to(self._device), None
        self._wait()

    def prefill(self) -> None:
        self._step()
        self._wait()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._step()
        self._wait()

    def end(self) -> None:
        self.cache = None

    def device_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None

    @torch.inference_mode()
    def _step(self) -> None:
        out = self.model(input_ids=self._tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self._tokens = out.logits[:, -1].argmax(-1, keepdim=True)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TransformersBackend(LoadedModel):
    """Raises UsageError where the model cannot be loaded."""

    def __init__(self, source: str, settings: Settings) -> None:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        super().__init__(
            load_model(source, device=settings.device, dtype=dtype, what="model", use="measured"), settings
        )
