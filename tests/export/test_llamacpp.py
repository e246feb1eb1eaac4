"""Exported files in the real runtime: llama.cpp gives the logits and text that transformers gives.

Skips itself where llama-cpp-python is not installed (`pip install "efficientllm[llamacpp]"` builds it from source).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="the gguf package is not installed")

from efficientllm.export.gguf import export_gguf  # noqa: E402
from efficientllm.export.gguf_tensors import K_QUANTS  # noqa: E402
from efficientllm.export.subject import subject_of  # noqa: E402
from efficientllm.models.loading import load_tokenizer, located  # noqa: E402
from export.llamacpp_runtime import DATA, plain_kernels, runtime, to_gguf  # noqa: E402, F401

POSITIONS = 200
TOLERANCE = 1e-3  # of a logit; those compared reach magnitudes of 8 to 31
GELU_TOLERANCE = 5e-2  # llama.cpp looks GELU up in a table of f16
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
UNTIED = {"tie_word_embeddings": False}
EVERY_FOURTH = [*["sliding_attention"] * 3, "full_attention"]
EVERY_SIXTH = [*["sliding_attention"] * 5, "full_attention"]
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.6}
LONG_ROPE |= {"short_factor": [1.0, 1.3, 1.7], "long_factor": [2.0, 3.0, 5.0]}


def logits(model: Any, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def assert_same_logits(folder: Path, out: Path) -> None:
    """f32 weights and cache: every logit within TOLERANCE, the most likely token the same at every position."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, reference.config.vocab_size, (POSITIONS,), generator=generator)
    with torch.inference_mode():
        want = reference(ids[None]).logits[0].numpy()
    with runtime(to_gguf(folder, out)) as model:
        got = logits(model, ids.tolist())
    assert np.abs(want).max() > 5.0
    gelu = getattr(reference.config, "hidden_activation", None) is not None
    np.testing.assert_allclose(got, want, rtol=0, atol=GELU_TOLERANCE if gelu else TOLERANCE)
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-mha-tied", {}),
        ("llama-gqa", {}),
        ("llama-gqa", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
        ("mistral-gqa-tied", {}),
        ("mistral-gqa-tied", {"hidden_size": 37, "num_attention_heads": 6}),
        ("qwen2-gqa-tied", {"head_dim": 10}),
        ("qwen2-gqa-tied", {}),
        ("qwen2-gqa-tied", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("qwen3-gqa", {}),
        ("qwen3-gqa", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen3-moe-gqa", {}),
        ("qwen3-moe-gqa", {"tie_word_embeddings": True, "num_experts": 6, "moe_intermediate_size": 32}),
        ("olmoe-gqa", {"num_key_value_heads": 4}),
        ("smollm3-gqa-tied", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
        ("granite-gqa", {}),
        ("olmo2-gqa", {"head_dim": 10}),
        ("olmo3-mha-tied", {"head_dim": 10, "num_hidden_layers": 5, "layer_types": EVERY_FOURTH} | UNTIED),
        ("gemma2-gqa-tied", {"num_hidden_layers": 3}),
        ("gemma2-gqa-tied", {"num_hidden_layers": 46, "initializer_range": 0.02}),
        ("gemma3-gqa", {"num_hidden_layers": 7, "layer_types": EVERY_SIXTH}),
        ("gemma3-gqa", {"layer_types": EVERY_SIXTH, "rope_parameters": GEMMA3_ROPE, "tie_word_embeddings": True}),
        ("phi-gqa", {"head_dim": 10}),
        ("phi-gqa", {"hidden_size": 37}),  # taken apart, as llama
        ("phi-gqa", {"head_dim": 10, "num_key_value_heads": 4, "rope_parameters": PARTIAL_ROPE}),
        ("phi-gqa", {"head_dim": 10, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
        ("phi-gqa", {"head_dim": 10, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256}),
    ],
)
def test_families_have_the_logits_of_transformers(
    make_model: Any, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder, _ = make_model(family, **changes)
    assert_same_logits(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("llama-gqa", {"rope_parameters": LLAMA3_ROPE}, "q8_0"),
        ("mistral-gqa-tied", {"hidden_size": 96, "num_attention_heads": 10}, "q4_1"),
        ("qwen2-gqa-tied", {"tie_word_embeddings": False}, "q4_1"),  # heads x head_dim is not hidden: a llama file
        ("qwen3-gqa", {}, "q4_1"),
    ],
)
def test_a_gguf_source_has_the_logits_of_llamacpp(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], kind: str
) -> None:
    """The dequantised tensors, as a folder in transformers and as an f32 file in llama.cpp; and the file as it was.

    llama.cpp rounds what it multiplies quantised weights with to 8 bits, so that the file itself is held less tightly.
    """
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    folder, _ = make_model(family, **(shape | changes))
    file = to_gguf(folder, tmp_path / "quantised.gguf", kind)
    converted = Path(located(str(file), "source"))
    assert_same_logits(converted, tmp_path / "f32.gguf")
    ids = torch.randint(3, 300, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)(ids[None]).logits[0].numpy()
    with runtime(file) as model:
        got = logits(model, ids.tolist())
        text = "the model learns to write 123 words<|endoftext|>"
        assert model.tokenize(text.encode(), special=True, add_bos=False) == load_tokenizer(str(file)).encode(text)
    # With random weights this large, 2 to 9 % of the root mean square of the logits; heads in a wrong order make 100 %.
    assert 0.0 < np.square(got - want).mean() < 0.2**2 * np.square(want).mean()


@pytest.mark.parametrize("name", ["", "ladder/*"])
def test_a_pruned_run_has_the_logits_of_transformers(finished_run: Path, tmp_path: Path, name: str) -> None:
    (folder,) = finished_run.glob(name) if name else [finished_run]
    subject = subject_of(folder)
    reference = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
    config = reference.config
    assert config.hidden_size != config.num_attention_heads * config.head_dim
    length = POSITIONS // 4
    assert length <= config.max_position_embeddings
    ids = torch.randint(3, 300, (4, length), generator=torch.Generator().manual_seed(0))
    start = AutoTokenizer.from_pretrained(subject.folder)("the model learns to write").input_ids
    with torch.inference_mode():
        want = reference(ids).logits.numpy()
        text = reference.generate(torch.tensor([start]), max_new_tokens=30, min_new_tokens=30, do_sample=False)
    largest = np.abs(want).max()
    assert largest > 1.0  # the size of the ladder was left after few steps, so that its logits are small still
    with runtime(to_gguf(folder, tmp_path / "m.gguf")) as model:
        got = np.stack([logits(model, row.tolist()) for row in ids])
        model.reset()
        written = [token for token, _ in zip(model.generate(start, temp=0.0), range(30), strict=False)]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * largest)
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    assert written == text[0, len(start) :].tolist()


@pytest.mark.parametrize("name", ["stories260K", "babyllama-0.9M"])
def test_trained_models_write_the_same_story(tmp_path: Path, name: str) -> None:
    folder = DATA / "weights" / name
    if not folder.is_dir():
        pytest.skip("the trained models are not here")
    assert_same_logits(folder, tmp_path / "f32.gguf")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("Once upon a time")]
    story = reference.generate(torch.tensor([ids]), max_new_tokens=80, do_sample=False)[0, len(ids) :].tolist()
    with runtime(tmp_path / "f32.gguf") as model:
        written = [token for token, _ in zip(model.generate(ids, temp=0.0), range(len(story)), strict=False)]
        assert written == story
        assert model.detokenize(written).decode() == tokenizer.decode(story)
    text = torch.tensor([[*ids, *story]])
    with torch.inference_mode():
        want = reference(text).logits[0].numpy()
    with runtime(to_gguf(folder, tmp_path / "q8_0.gguf", "q8_0")) as model:
        got = logits(model, text[0].tolist())
    assert (got.argmax(1) == want.argmax(1)).mean() > 0.95
    assert 0.0 < np.abs(got - want).max() < 1.0


@pytest.mark.parametrize(
    ("kind", "hidden", "becomes"),
    [
        ("q4_k_m", 256, "Q4_K"),
        *[(kind, 96, instead.upper()) for kind, instead in K_QUANTS.items()],
        ("q4_k_m", 100, "F16"),
    ],
)
def test_k_quants_fall_back_to_what_the_export_says(
    make_model: Any, tmp_path: Path, kind: str, hidden: int, becomes: str
) -> None:
    """llama.cpp's own quantiser on the f16 file, where rows are multiples of 256, of 32, of neither."""
    import gguf

    folder, _ = make_model("llama-gqa", hidden_size=hidden, intermediate_size=256, head_dim=64)
    said: list[str] = []
    source = export_gguf(subject_of(folder), kind, tmp_path / "m-f16.gguf", say=said.append)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"), 1
    out = tmp_path / f"m-{kind}.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options) == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert types["blk.0.ffn_up.weight"] == becomes
    told = f"hidden size {hidden} is no multiple of 256: matrices with such rows become {becomes.lower()} instead"
    assert any(told in note for note in said) == (hidden != 256)
    with runtime(out) as model:
        assert np.isfinite(logits(model, list(range(40)))).all()
