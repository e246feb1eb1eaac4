"""A model in transformers and PyTorch: the model's own forward with its dynamic cache, greedy, without generate().

It computes with as many threads as the process has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from efficientllm.benching.settings import Settings
from efficientllm.models.loading import load_model
from efficientllm.models.space import build


class TransformersBackend:
    """Of a model that is on its device, in its dtype."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self.model: Any = model.eval()
        self._settings = settings

    def run(self, batch: int) -> Iterator[Tensor]:
        """As process.measure takes it: (batch, prompt) random tokens, the same every time, then (batch, 1) twice."""
        settings, device = self._settings, torch.device(self._settings.device)
        shape, generator = (batch, settings.prompt), torch.Generator().manual_seed(batch)
        tokens = torch.randint(self.model.config.vocab_size, shape, generator=generator).to(device)
        cache = None
        for steps in (0, 1, settings.generate - 1):
            for _ in range(steps):
                tokens, cache = self.step(tokens, cache)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield tokens

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(batch, 1) most likely next tokens, and transformers' DynamicCache with these tokens in it."""
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


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
        list(load_backend(folder, replace(settings, prompt=2, generate=2)).run(1))
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats(settings.device)
