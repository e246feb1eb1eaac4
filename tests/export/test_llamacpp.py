"""Exported files in the real runtime: llama.cpp gives the tokens, logits and text that transformers gives.

Skips itself where llama-cpp-python is not installed (`pip install "efficientllm[llamacpp]"` builds it from source).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="the gguf package is not installed")

from efficientllm.export.gguf import GGUFRequest, export_gguf  # noqa: E402
from efficientllm.export.gguf_pretokenizers import LLAMA3, NAMES, QWEN2  # noqa: E402
from efficientllm.export.subject import subject_of  # noqa: E402

DATA = Path(__file__).parents[3] / "shared" / "data"
F32 = 0  # ggml's number of the type, for an f32 cache of keys and values
POSITIONS = 200
TOLERANCE = 1e-3  # of a logit; those compared reach magnitudes of 8 to 31
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces before,  two between, and two after  ",
    "tabs\tand\nnew\n\nlines\r\n\r\n   \n x",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ½ ² ٣٤",
    "it's we'll I'VE they'd 'tis don''t ''' '",
    "naïve café Ærøskøbing ÀÉÎÕÜ straße",
    "日本語のテキスト 中文字符 한국어",
    "Привет, мир! Γειά σου שלום مرحبا नमस्ते ไทย",
    "emoji 🚀🌍 👨‍👩‍👧‍👦 🏳️‍🌈 ☺️ 🇩🇪",
    "def f(x):\n    return x ** 2  # twice\n\nclass A:\n\tpass",
    "<div class='a'>&nbsp;</div> {\"k\": [1, 2.5e-3, null]}",
    "a\u0301 e\u0302 \u200b zero\u00a0width\u2003space \ufeff",
    "<|endoftext|>", "text<|endoftext|> more <|endoftext|>", "<s> a </s><unk>b",
    "!!!???...---___***///\\\\", "      x", "x      ", "\n", "a", "▁ ▁▁x", "\x00\x01\x7f",
]  # fmt: skip


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No repacking of weights for AMX: virtual machines that announce those tiles may fault on them."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def without() -> Any:
        options = defaults()
        options.use_extra_bufts = False
        return options

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without)


@contextmanager
def runtime(file: Path) -> Iterator[Any]:
    options = {
        "n_ctx": 256,
        "n_batch": 256,
        "n_ubatch": 256,
        "n_threads": 1,
        "n_threads_batch": 1,
        "logits_all": True,
        "verbose": False,
    }
    with closing(llama_cpp.Llama(str(file), type_k=F32, type_v=F32, **options)) as model:
        yield model


def to_gguf(folder: Path, out: Path, kind: str = "f32") -> Path:
    return export_gguf(GGUFRequest(subject_of(folder), kind, out), lambda note: None)


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
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
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
    ],
)
def test_families_have_the_logits_of_transformers(
    make_model: Any, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder, _ = make_model(family, **changes)
    assert_same_logits(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["", "ladder/*"])
def test_a_pruned_run_has_the_logits_of_transformers(finished_run: Path, tmp_path: Path, name: str) -> None:
    (folder,) = finished_run.glob(name) if name else [finished_run]
    subject = subject_of(folder)
    reference = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
    assert reference.config.hidden_size != reference.config.num_attention_heads * reference.config.head_dim
    ids = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = reference(ids[None]).logits[0].numpy()
    with runtime(to_gguf(folder, tmp_path / "m.gguf")) as model:
        got = logits(model, ids.tolist())
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


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


def llama3_like(tokenizer: PreTrainedTokenizerFast, regex: str, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """The same merges after another cut of the text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    cut = pre_tokenizers.Split(Regex(regex), behavior="isolated", invert=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.model.ignore_merges = ignore_merges
    return wrapped(tokenizer, backend)


def wrapped(tokenizer: Any, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that transformers loads as it is saved."""
    end = tokenizer.eos_token
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokenizer.bos_token, eos_token=end)


def saved_tokenizers(folder: Path) -> dict[str, Path]:
    """Real vocabularies under every pre-tokenizer that is known by name, and the two SentencePiece ones."""
    paths = {}
    gpt2 = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")
    smollm = Tokenizer.from_file(str(DATA / "tokenizers" / "smollm2" / "tokenizer.json"))
    smollm.no_truncation()
    made = {
        "gpt-2": gpt2,
        "smollm": wrapped(AutoTokenizer.from_pretrained(DATA / "tokenizers" / "smollm2"), smollm),
        "qwen2": llama3_like(gpt2, QWEN2, False),
        "llama-bpe": llama3_like(gpt2, LLAMA3, True),
        "dbrx": llama3_like(gpt2, LLAMA3, False),
    }
    for name, tokenizer in made.items():
        paths[name] = folder / name
        tokenizer.save_pretrained(paths[name])
    return paths | {name: DATA / "weights" / name for name in ("stories260K", "babyllama-0.9M")}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, Any]]]:
    """By name: llama.cpp's reading of the exported vocabulary, and transformers' tokenizer."""
    if not (DATA / "tokenizers").is_dir():
        pytest.skip("the tokenizers are not here")
    from conftest import tiny_model

    folder, loaded = tmp_path_factory.mktemp("vocabularies"), {}
    for name, path in saved_tokenizers(folder).items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model_folder = folder / f"{name}-model"
        tiny_model("llama-gqa", vocab_size=len(tokenizer) + 3, hidden_size=4, tie_word_embeddings=True).save_pretrained(
            model_folder
        )
        tokenizer.save_pretrained(model_folder)
        file = to_gguf(model_folder, folder / f"{name}.gguf", "f16")
        reader = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        loaded[name] = (reader, AutoTokenizer.from_pretrained(model_folder))
    yield loaded
    for reader, _ in loaded.values():
        reader.close()


ALL = [*NAMES.values(), "stories260K", "babyllama-0.9M"]


def assert_same_ids(reader: Any, tokenizer: Any, text: str) -> None:
    want = tokenizer.encode(text, add_special_tokens=False)
    assert reader.tokenize(text.encode(), add_bos=False, special=True) == want, repr(text)


@pytest.mark.parametrize("name", ALL)
def test_texts_become_the_same_tokens(vocabularies: dict[str, tuple[Any, Any]], name: str) -> None:
    reader, tokenizer = vocabularies[name]
    for text in TEXTS:
        assert_same_ids(reader, tokenizer, text)
    if tokenizer.unk_token_id is None or name in NAMES.values():  # nothing is lost: back to the same text
        for text in TEXTS[:10]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert reader.detokenize(ids).decode() == text


PIECES = st.sampled_from(
    ["'s", "'LL", "  ", "\n\n", "\t", "don't", "123", "٤", "é", "e\u0301", "中", "🚀", " the", "<|"]
)
ANY_TEXT = st.lists(
    st.one_of(PIECES, st.text(max_size=6), st.text(st.characters(codec="ascii"), max_size=6)), max_size=8
)


@pytest.mark.parametrize("name", ALL)
def test_any_text_becomes_the_same_tokens(vocabularies: dict[str, tuple[Any, Any]], name: str) -> None:
    reader, tokenizer = vocabularies[name]

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(ANY_TEXT.map("".join))
    def agree(text: str) -> None:
        if name == "babyllama-0.9M" and not text.strip(" "):
            return  # said by the export: one space less where there is nothing else
        assert_same_ids(reader, tokenizer, text)

    agree()


def test_what_goes_around_a_text_and_ends_it(make_model: Any, tmp_path: Path) -> None:
    """A tokenizer that puts bos before the text, a chat template, and a second token that ends a turn."""
    from tokenizers.processors import TemplateProcessing

    folder, _ = make_model("llama-gqa")
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(folder))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    single = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=single)
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    folder, model = make_model("llama-gqa", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    model.generation_config.save_pretrained(folder)
    with runtime(to_gguf(folder, tmp_path / "m.gguf")) as reader:
        assert reader.tokenize(b"the model", add_bos=True) == tokenizer.encode("the model")
        assert reader.token_bos() == tokenizer.bos_token_id
        assert reader.token_eos() == tokenizer.eos_token_id
        assert reader.metadata["tokenizer.ggml.eot_token_id"] == "7"
        assert reader.metadata["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(("hidden", "fallback"), [(256, False), (96, True)])
def test_k_quants_fall_back_where_the_export_says_so(
    make_model: Any, tmp_path: Path, hidden: int, fallback: bool
) -> None:
    """llama.cpp's own quantiser on the f16 file: Q4_K where rows are multiples of 256, blocks of 32 elsewhere."""
    import gguf

    folder, _ = make_model("llama-gqa", hidden_size=hidden, intermediate_size=256, head_dim=64)
    said: list[str] = []
    source = export_gguf(GGUFRequest(subject_of(folder), "q4_k_m", tmp_path / "m-f16.gguf"), said.append)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    out = tmp_path / "m-q4_k_m.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), options) == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert any("hidden size 96 is no multiple of 256" in note for note in said) == fallback
    assert types["blk.0.ffn_up.weight"] == ("Q5_0" if fallback else "Q4_K")
    assert types["blk.1.ffn_down.weight"] in ("Q4_K", "Q6_K")
    with runtime(out) as model:
        assert np.isfinite(logits(model, list(range(40)))).all()
