"""Tiny models of every family, MHA and GQA, tied and untied, with odd shapes; a small world to run jobs in."""

from __future__ import annotations

import json
import os
import random
import signal
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a worker a CPU, and the same last bits on any machine

import pytest
import torch
import transformers
import yaml
from hypothesis import settings
from transformers import PretrainedConfig, PreTrainedModel

from efficientllm.demo.corpus import train_tokenizer, write_corpus
from efficientllm.models.space import build, space_of

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama-mha-tied": (transformers.LlamaConfig, {"num_key_value_heads": 4} | TIED),
    "llama-gqa": (transformers.LlamaConfig, UNTIED),
    "mistral-gqa-tied": (transformers.MistralConfig, {"sliding_window": None} | TIED),
    "qwen2-gqa-tied": (transformers.Qwen2Config, TIED),
    "qwen3-gqa": (transformers.Qwen3Config, UNTIED),
    "smollm3-gqa-tied": (transformers.SmolLM3Config, {"no_rope_layer_interval": 2}),
    "granite-gqa": (
        transformers.GraniteConfig,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2, "logits_scaling": 1.5}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "olmo2-gqa": (transformers.Olmo2Config, {}),
    "olmo3-mha-tied": (transformers.Olmo3Config, {"num_key_value_heads": 4} | TIED | WINDOWS),
    "gemma2-gqa-tied": (
        transformers.Gemma2Config,
        {"query_pre_attn_scalar": 9, "final_logit_softcapping": 9.0, "attn_logit_softcapping": 3.0} | WINDOWS,
    ),
    "gemma3-gqa": (transformers.Gemma3TextConfig, {"query_pre_attn_scalar": 9} | UNTIED | WINDOWS),
    # llama.cpp wants tokens that are not here of whatever has "phi3" in its name.
    "phi-gqa": (transformers.Phi3Config, {}),
    "qwen3-moe-gqa": (
        transformers.Qwen3MoeConfig,
        {"norm_topk_prob": True, "moe_intermediate_size": 16} | EXPERTS | UNTIED,
    ),
    "olmoe-gqa": (transformers.OlmoeConfig, {"head_dim": 10, "intermediate_size": 16} | EXPERTS | UNTIED),
}


# The same examples in every run, and no deadline: other work on the machine must not fail a test.
settings.register_profile("usual", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever stands on the tiny world makes runs or reads what a run has left."""
    for item in items:
        if "world" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


def tiny_config(family: str, **changes: object) -> PretrainedConfig:
    """Lists by layer are repeated or cut to as many layers as there are."""
    kind, options = FAMILIES[family]
    values: dict[str, Any] = SHAPE | options | changes
    if "layer_types" in values:
        layers = values["num_hidden_layers"]
        values["layer_types"] = (values["layer_types"] * layers)[:layers]
    return kind(**values)


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model whose weights are large enough for every path to matter (biases and gains included)."""
    torch.manual_seed(seed)
    model = build(tiny_config(family, **changes))
    offsets = space_of(model.config).offsets
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.3)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1)
            else:
                weight.uniform_(0.5, 1.5).sub_(offsets.get(name, 0.0))
    return model


def need_llamacpp() -> None:
    """Skips a test that runs llama.cpp in a process of its own, where it is not installed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="the gguf package is not installed")


@cache
def task_manager() -> Any:
    """The harness's list of tasks, made once: it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def listed_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness, which is imported here alone: every worker reads every file, and the import takes seconds."""
    pytest.importorskip("lm_eval", reason='needs pip install "efficientllm[eval]"')
    manager = task_manager()
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: manager)


@pytest.fixture
def small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's corpus is of the first modules of the standard library alone, a tenth of it."""
    library, size = tmp_path / "library", 0
    library.mkdir()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if size < 1_400_000:
            size += (library / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("efficientllm.demo.story.write_corpus", partial(write_corpus, library=library))


@pytest.fixture(scope="session", autouse=True)
def kernels_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch.compile keeps its kernels in a folder of this session: its usual one outlives it, and kernels made there
    for other CPU features (ATEN_CPU_CAPABILITY) abort the process that loads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and Python then leaves it so."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """No test, and nothing that it calls in this process, may leave another number of threads behind: on some CPUs
    that changes the last bits of every matrix product after it."""
    before = torch.get_num_threads()
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(before)
    assert left == before, f"{left} threads are left of {before}"


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["llama-mha-tied", "qwen3-gqa", "gemma2-gqa-tied", "phi-gqa"])
def some_family(request: pytest.FixtureRequest) -> str:
    """For what is the same code in every family, and slow: those that differ most."""
    return request.param


@dataclass(frozen=True)
class World:
    """A folder with a text corpus, a tokenizer and a tiny source model, and a recipe over them."""

    folder: Path

    def recipe(self, name: str, **sections: dict[str, object]) -> dict[str, object]:
        """A recipe of 24 steps, pruned over the first half, into runs/NAME; sections are merged into it."""
        recipe: dict[str, dict[str, object] | str] = {
            "source": str(self.folder / "source"),
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "validation": str(self.folder / "validation.jsonl"),
                "sequence_length": 32,
                "cache_dir": str(self.folder / "cache"),
                "workers": 1,
            },
            "train": {"tokens": 24 * 256, "batch_tokens": 256, "micro_batch": 4, "lr": 1e-2},
            "prune": {"target": "50%", "end": "50%", "floors": {"intermediate": 8}, "bound": 0.05},
            "run": {"dir": str(self.folder / "runs" / name), "checkpoint_every": 8 * 256, "validate_every": 8 * 256}
            | {"report": False},
        }
        for section, values in sections.items():
            old = recipe.get(section)
            recipe[section] = {**old, **values} if isinstance(old, dict) and isinstance(values, dict) else values
        return recipe

    def write(self, name: str, **sections: dict[str, object]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.recipe(name, **sections)))
        return path


@contextmanager
def world_of(folder: Path, text: str, vocabulary: int) -> Iterator[World]:
    """A world whose tokenizer has learnt from one of the texts in the folder. Its runs leave out run.png, which takes
    as long as all the rest of them; the `finished` one of jobs draws it."""
    tokenizer = train_tokenizer([folder / text], vocabulary, folder / "tokenizer")
    torch.manual_seed(0)
    model = build(tiny_config("llama-gqa", vocab_size=vocabulary, tie_word_embeddings=True))
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efficientllm.jobs.finish.plot_run", lambda *_: None)
        yield World(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    chooser = random.Random(0)
    words = ["the", "model", "learns", "to", "write", "short", "words", "and", "prunes", "its", "own", "heads"]
    for name, documents in (("train", 120), ("validation", 12)):
        lines = [json.dumps({"text": " ".join(chooser.choices(words, k=80))}) for _ in range(documents)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with world_of(folder, "train.jsonl", 300) as made:
        yield made
