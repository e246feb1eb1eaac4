"""Both runtimes compute what the model says, and facts from shapes equal what is really there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_config, tiny_model
from efficientllm.benching.results import machine
from efficientllm.benching.settings import Settings, llamacpp_dtype
from efficientllm.benching.subjects import facts_of_config, facts_of_gguf, subjects
from efficientllm.benching.transformers_backend import load_backend
from efficientllm.errors import UsageError

SETTINGS = Settings(11, 6, (1, 3), 2, "transformers", "cpu", "float32", 1)


def greedy(folder: Path, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely continuation without any cache: (batch, count)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = prompts
    with torch.inference_mode():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens[:, prompts.shape[1] :]


def cache_of(backend: Any, batch: int, steps: int) -> int:
    """Bytes of keys and values after the prompts and `steps` further tokens of each sequence."""
    tokens, cache = next(backend.run(batch)), None
    for _ in range(1 + steps):
        tokens, cache = backend.step(tokens, cache)
    assert cache is not None
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_and_weights_take_what_facts_say(some_family: str, dtype: str, tmp_path: Path) -> None:
    tiny_model(some_family).save_pretrained(tmp_path)
    asked = Settings(**(SETTINGS.__dict__ | {"dtype": dtype}))
    backend = load_backend(str(tmp_path), asked)
    kept = cache_of(backend, 3, asked.generate)  # one step more than a run: every position is then in the cache
    facts = facts_of_config(backend.model.config, asked.prompt, asked.context, getattr(torch, dtype))
    assert 3 * facts["cache_bytes"] == kept
    weights = list(backend.model.parameters())
    assert facts["weight_bytes"] == sum(weight.nbytes for weight in weights)
    assert facts["parameters"] == sum(weight.numel() for weight in weights)


def test_a_sliding_window_bounds_cache_and_attention(tmp_path: Path) -> None:
    tiny_model("mistral-gqa-tied", sliding_window=5).save_pretrained(tmp_path)
    backend = load_backend(str(tmp_path), SETTINGS)
    kept = cache_of(backend, 1, 6)
    config = backend.model.config
    facts = facts_of_config(config, 11, 17, torch.float32)
    assert facts["cache_bytes"] == kept
    assert facts["decode_flops"] == facts_of_config(config, 11, 5, torch.float32)["decode_flops"]


def test_transformers_generates_greedily(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    backend = load_backend(str(tmp_path), SETTINGS)
    prompts, first, last = backend.run(3)
    want = greedy(tmp_path, prompts, 6)
    assert torch.equal(first, want[:, :1])
    assert torch.equal(last, want[:, -1:])
    assert torch.equal(next(backend.run(3)), prompts)  # every run of a batch has the same work


@pytest.fixture
def make_gguf(world: Any, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A model folder of a family with the world's tokenizer, and its f32 GGUF file."""
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    from efficientllm.export.gguf import export_gguf
    from efficientllm.export.subject import subject_of

    def make(family: str) -> tuple[Path, Path]:
        folder = tmp_path / "source"
        tiny_model(family, vocab_size=300).save_pretrained(folder)
        for file in (world.folder / "tokenizer").glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        out = tmp_path / "model.gguf"
        return folder, export_gguf(subject_of(folder), "f32", out, say=lambda note: None)

    return make


@pytest.mark.parametrize("family", ["llama-mha-tied", "qwen2-gqa-tied", "qwen3-gqa", "granite-gqa", "phi-gqa"])
def test_a_gguf_file_has_the_facts_of_its_source(make_gguf: Any, family: str) -> None:
    _, file = make_gguf(family)
    of_config = facts_of_config(tiny_config(family, vocab_size=300), 11, 17, torch.float32)
    of_file = facts_of_gguf(file, 11, 17)
    assert of_file.pop("prefill_flops") == pytest.approx(of_config.pop("prefill_flops"), rel=1e-12)
    assert of_file == of_config | {"type": "f32", "cache_bytes": of_config["cache_bytes"] // 2}  # a cache in f16


@pytest.mark.parametrize(("kind", "said"), [("f32", "f32"), ("bf16", "bf16"), ("q8_0", "f16")])
def test_a_gguf_file_says_what_its_weights_are(make_gguf: Any, tmp_path: Path, kind: str, said: str) -> None:
    from efficientllm.export.gguf import export_gguf
    from efficientllm.export.subject import subject_of

    folder, _ = make_gguf("llama-gqa")  # rows of 40, 24 and 52: no multiples of 32
    file = export_gguf(subject_of(folder), kind, tmp_path / "other.gguf", say=lambda note: None)
    assert facts_of_gguf(file, 11, 17)["type"] == said


def test_files_that_are_no_whole_decoder_are_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

    def written(name: str, tensor: str, parts: int) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key in ("block_count", "head_count", "head_count_kv", "embedding_length", "context_length"):
            getattr(writer, f"add_{key}")(4)
        writer.add_uint16("split.count", parts)
        writer.add_tensor(tensor, torch.ones(4, 4).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    with pytest.raises(UsageError, match=r"is no whole decoder: .*token_embd\.weight"):
        facts_of_gguf(written("adapter.gguf", "blk.0.attn_q.weight", 1), 2, 3)
    with pytest.raises(UsageError, match=r"one of 3 parts of a model.*llama-gguf-split --merge"):
        facts_of_gguf(written("part.gguf", "token_embd.weight", 3), 2, 3)


def test_the_type_that_folders_are_exported_to() -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    assert llamacpp_dtype("auto", ["a.gguf", "run"]) == "f16"
    assert llamacpp_dtype("auto", ["run"]) == "f16"
    assert llamacpp_dtype("q8_0", ["run"]) == "q8_0"


def test_an_accelerator_of_llamacpp_is_not_called_by_the_processor_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A Board")
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(__version__="1"))
    asked = replace(SETTINGS, backend="llamacpp", device="gpu")
    assert machine(asked)["device"] == "A Board"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "does not name" in machine(asked)["device"]


def test_a_full_disk_for_temporary_files_names_the_mend(
    make_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_gguf("llama-gqa")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    asked = replace(SETTINGS, backend="llamacpp", dtype="f16")
    with pytest.raises(UsageError, match=r"set TMPDIR") as raised:
        subjects([str(folder)], asked, tmp_path / "temporary", lambda note: None)
    assert "--out" not in str(raised.value)


@pytest.mark.parametrize("chunk", [512, 7])
def test_llamacpp_generates_greedily(make_gguf: Any, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Three sequences at once, their prompts in one graph or cut anywhere."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from efficientllm.benching import llamacpp_backend

    defaults = llama_cpp.llama_model_default_params

    def plain_kernels() -> Any:
        """No repacking of weights for AMX: virtual machines that announce those tiles may fault on them."""
        options = defaults()
        options.use_extra_bufts = False
        return options

    monkeypatch.setattr(llama_cpp, "llama_model_default_params", plain_kernels)
    monkeypatch.setattr(llamacpp_backend, "PHYSICAL_BATCH", chunk)
    folder, file = make_gguf("llama-gqa")
    backend = llamacpp_backend.LlamaCppBackend(str(file), SETTINGS)
    for _ in range(2):
        prompts, first, last = backend.run(3)
        want = greedy(folder, torch.tensor(prompts), 6)
        assert first == want[:, 0].tolist()
        assert last == want[:, -1].tolist()
