"""A GGUF file as a source: the weights, logits and tokens of the model that it was written from."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
gguf_new_metadata = pytest.importorskip("gguf.scripts.gguf_new_metadata")

from conftest import World, tiny_model  # noqa: E402
from efficientllm.benching.subjects import config_of  # noqa: E402
from efficientllm.errors import UsageError  # noqa: E402
from efficientllm.export.subject import subject_of  # noqa: E402
from efficientllm.files import locked  # noqa: E402
from efficientllm.models import gguf_source, loading  # noqa: E402
from efficientllm.models.loading import load_config, load_model, load_tokenizer, located  # noqa: E402
from export import gguf_files  # noqa: E402
from processes import call  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make(world: World, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A GGUF file of a tiny model with the world's tokenizer, and the model."""

    def make(family: str = "llama-gqa", kind: str = "f32", **changes: Any) -> tuple[Path, Any]:
        folder, out = tmp_path / family, tmp_path / "tiny model.gguf"
        model = tiny_model(family, **({"vocab_size": 300} | changes)).eval()
        model.save_pretrained(folder)
        for file in (world.folder / "tokenizer").glob("tokenizer*"):
            shutil.copy(file, folder / file.name)
        gguf_files.write(folder, kind, out=out, overwrite=True)
        return out, model

    return make


def changed(file: Path, out: Path, *, without: str = "", **fields: Any) -> Path:
    """A copy of a GGUF file with other metadata (a dot in a key is written as __), or without a tensor."""
    reader, values = gguf.GGUFReader(file), {name.replace("__", "."): value for name, value in fields.items()}
    reader.tensors = [tensor for tensor in reader.tensors if tensor.name != without]
    writer = gguf.GGUFWriter(out, values.pop("general.architecture", "llama"))
    kinds = {name: gguf.GGUFValueType.get_type(value) for name, value in values.items() if value is not None}
    new = {name: gguf_new_metadata.MetadataDetails(kind, values[name]) for name, kind in kinds.items()}
    gguf_new_metadata.copy_with_new_metadata(reader, writer, new, [name for name in values if name not in kinds])
    return out


@pytest.mark.parametrize(
    ("family", "changes", "becomes"),
    [
        ("llama-mha-tied", {}, "llama"),
        ("llama-gqa", {"rope_parameters": gguf_files.LLAMA3, "head_dim": 16}, "llama"),
        ("mistral-gqa-tied", {}, "llama"),
        ("mistral-gqa-tied", {"hidden_size": 37, "num_attention_heads": 6}, "mistral"),
        ("qwen2-gqa-tied", {"head_dim": 10}, "qwen2"),
        ("qwen2-gqa-tied", {"tie_word_embeddings": False}, "qwen2"),  # heads x head_dim is not hidden: a llama file
        ("qwen3-gqa", {}, "qwen3"),
    ],
)
def test_every_family_comes_back_as_it_was(make: Any, family: str, changes: dict[str, Any], becomes: str) -> None:
    file, model = make(family, **changes)
    found = load_model(str(file))
    want, have = model.state_dict(), found.state_dict()
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    ids = torch.randint(3, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(found.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    config = load_config(str(file))
    assert (config.model_type, config.rms_norm_eps) == (becomes, 1e-5)  # not 9.999999747378752e-06
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert config.bos_token_id == config.eos_token_id == 0


@pytest.mark.parametrize("kind", ["q8_0", "q4_1", "f16"])
def test_weights_are_those_of_the_blocks(make: Any, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, model = make("llama-gqa", kind, hidden_size=64, intermediate_size=96, head_dim=16)
    found = load_model(str(file)).state_dict()
    head = gguf.GGMLQuantizationType.Q8_0 if kind == "q4_1" else gguf.GGMLQuantizationType[kind.upper()]
    for name, weight in model.state_dict().items():
        type_ = head if name == "lm_head.weight" else gguf.GGMLQuantizationType[kind.upper()]
        if weight.ndim == 2:  # rows of q and k lie in another order in the file, each of whole blocks
            blocks = gguf.quants.quantize(weight.numpy(), type_)
            weight = torch.from_numpy(gguf.quants.dequantize(blocks, type_))
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], weight), name
    types = {"q8_0": "Q8_0", "q4_1": "Q4_1 and Q8_0", "f16": "F16"}[kind]
    assert (
        f"{file}: {types} weights are dequantised to fp32, once, in {located(str(file), 'source')}\n"
        in capsys.readouterr().err
    )


def test_the_folder_is_ordinary_and_made_once(make: Any, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, model = make()
    folder = Path(located(str(file), "source"))
    assert cache in folder.parents
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]  # nothing half-made
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    ours = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    assert not ours & json.loads((folder / "config.json").read_text()).keys()
    capsys.readouterr()
    again = file.with_name("again.gguf")
    shutil.copy(file, again)  # by content, not by name
    assert located(str(again), "source") == str(folder)
    assert capsys.readouterr().err == ""
    assert (subject_of(again).folder, subject_of(again).name) == (folder, "again")
    assert config_of(str(again), SimpleNamespace(context=64)).hidden_size == 40  # as bench takes it
    with pytest.raises(UsageError, match="takes 64 positions at most"):
        config_of(str(again), SimpleNamespace(context=65, prompt=60, generate=5))
    assert located(str(make(seed=1)[0]), "source") != str(folder)


def test_one_process_makes_it_while_others_wait(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = make()
    folder = Path(located(str(file), "source"))
    kept = folder.rename(tmp_path / "kept")
    waits, found, said = threading.Event(), list[str](), list[str]()
    monkeypatch.setattr(gguf_source, "_say", lambda message: (said.append(message), waits.set()))
    with locked(folder.with_suffix(".lock"), lambda: pytest.fail("nobody else has the lock")):
        other = threading.Thread(target=lambda: found.append(located(str(file), "source")))
        other.start()
        assert waits.wait(60)
        kept.rename(folder)
    other.join()
    assert found == [str(folder)]
    assert said == [f"{file}: another process dequantises it; waiting"]


def test_settings_of_generation_and_the_length_of_context(make: Any, tmp_path: Path) -> None:
    file, _ = make()
    ends = {"tokenizer__ggml__eot_token_id": 7, "tokenizer__ggml__eom_token_id": 0}
    odd = changed(file, tmp_path / "odd.gguf", tokenizer__ggml__padding_token_id=5, **ends)
    found = loading.load_generation_config(str(odd))
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, [0, 7], 5)
    assert load_config(str(odd)).max_position_embeddings == load_tokenizer(str(odd)).model_max_length == 64
    assert loading.load_generation_config(str(tmp_path / "gone.gguf"), lambda note: None) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"general__architecture": "gemma3"}, "its architecture 'gemma3' is none of llama, qwen2 and qwen3"),
        ({"split__count": 3}, "is one of 3 parts of a model; join them: llama-gguf-split --merge"),
        ({"llama__block_count": None}, "does not say its block_count"),
        ({"llama__attention__head_count": [4, 2]}, "its attention.head_count is not the same in every layer"),
        ({"llama__attention__head_count": 0}, "its attention.head_count is no positive number"),
        ({"llama__rope__scaling__type": "yarn"}, "it scales its rotary positions"),
        ({"llama__rope__dimension_count": 4}, "it rotates a part of each head"),
        ({"llama__block_count": 1}, "it holds blk.1.attn_norm.weight, which is no weight of llama models"),
        ({"llama__block_count": 3}, "it lacks blk.2.attn_norm.weight"),
        ({"llama__feed_forward_length": 51}, r"has in another shape than \(51, 40\) blk.0.ffn_gate.weight"),
        ({"without": "output_norm.weight"}, "it lacks output_norm.weight, a weight of llama models"),
        ({"without": "token_embd.weight"}, "it lacks token_embd.weight"),
        (
            {"tokenizer__ggml__model": "t5"},
            "its tokenizer cannot be built: its kind, 't5', is neither gpt2 .* nor llama",
        ),
        (
            {"tokenizer__ggml__pre": "tekken"},
            "cannot be built: its way to cut text, 'tekken', is none of gpt-2, smollm",
        ),
        ({"tokenizer__ggml__tokens": None}, "its tokenizer cannot be built: it holds no list of tokens"),
        ({"tokenizer__ggml__merges": ["q qqq"]}, "its tokenizer cannot be built: .*out of vocabulary"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_a_source_is_one_sentence(make: Any, tmp_path: Path, change: Any, reason: str) -> None:
    file, _ = make()
    with pytest.raises(UsageError, match=reason) as raised:
        load_model(str(changed(file, tmp_path / "odd.gguf", **change)), what="model")
    assert str(raised.value).startswith(f"model '{tmp_path / 'odd.gguf'}' ")
    assert "\n" not in str(raised.value)
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]


def test_files_that_are_no_whole_model(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = make()
    content, path = file.read_bytes(), tmp_path / "odd.gguf"

    def refused(reason: str, what: bytes | None = None) -> None:
        if what is not None:
            path.write_bytes(what)
        with pytest.raises(UsageError, match=reason) as raised:
            load_tokenizer(str(path))
        assert "\n" not in str(raised.value)

    refused("tokenizer '.*odd.gguf': there is no such file; check the path")
    refused("is no GGUF file, by its first bytes", b"")
    refused("is no GGUF file, by its first bytes", b"PK\3\4 and so on")
    for length in (5, 200, len(content) // 2, len(content) - 100):
        refused(r"is damaged, incomplete or newer than gguf \(.+\); copy it anew", content[:length])
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused("holds a vocabulary and no weights; name the model's file")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "file"))
    refused("cannot keep the dequantised weights of .* set EFFICIENTLLM_CACHE to a folder", content)


def test_a_type_that_gguf_cannot_read(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = make()
    monkeypatch.setattr(gguf, "dequantize", Mock(side_effect=NotImplementedError))
    with pytest.raises(UsageError, match=r"the gguf package cannot dequantise F32 \(token_embd.weight\)"):
        load_model(str(file))


def test_without_the_package_it_says_how_to_get_it(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = make()
    for name in [name for name in sys.modules if name.startswith("efficientllm.models.gguf_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r'needs the gguf package: pip install "efficientllm\[gguf\]"'):
        load_config(str(file))


def test_plan_and_prune_take_it(make: Any, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, model = make("llama-gqa")
    named = changed(file, tmp_path / "named.gguf", tokenizer__chat_template="{{ messages[0].content }}")
    recipe = world.write("of-gguf", source=str(named), distill={"teacher": str(named)})
    for command in ("plan", "prune"):
        assert call(command, recipe) == 0
    assert capsys.readouterr().err.count("weights are dequantised") == 1
    run = world.folder / "runs" / "of-gguf"
    assert json.loads((run / "summary.json").read_text())["source"]["path"] == str(named)
    result = AutoModelForCausalLM.from_pretrained(run / "model")
    assert result.num_parameters() < model.num_parameters()
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == "{{ messages[0].content }}"
