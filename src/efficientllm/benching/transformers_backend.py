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


class TransformersBackend:
    """Of a model that is on its device, in its dtype."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self._device = torch.device(settings.device)
        self._prompt = settings.prompt
        self.model: Any = model.eval()
        self.cache: Any = None  # transformers' DynamicCache of the run under way
        self.tokens = torch.empty(0)  # (batch, prompt) before prefill, then the last ones, (batch, 1)

    def begin(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(self.model.config.vocab_size, (batch, self._prompt), generator=generator)
        self.tokens, self.cache = tokens.to(self._device), None
        self.decode(0)

    def prefill(self) -> None:
        self.decode(1)  # a step on the whole prompt

    @torch.inference_mode()
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            out = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
            self.tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def end(self) -> None:
        self.cache = None

    def device_peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def load_backend(source: str, settings: Settings) -> TransformersBackend:
    """Raises UsageError where the model cannot be loaded."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    model = load_model(source, device=settings.device, dtype=dtype, what="model", use="measured")
    return TransformersBackend(model, settings)


def rehearse(settings: Settings) -> None:
    """Loads and runs a Llama of a few hundred weights: what transformers and PyTorch import and set up when a model is
    first used (some 150 MB) is none of the measured model's memory."""
    shape: dict[str, Any] = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    with tempfile.TemporaryDirectory(prefix="efficientllm-") as folder:
        build(LlamaConfig(**shape)).save_pretrained(folder)
        tiny = load_backend(folder, replace(settings, prompt=2))
        tiny.begin(1)
        tiny.decode(2)
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats(settings.device)
