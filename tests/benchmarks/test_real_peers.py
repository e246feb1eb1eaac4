"""benchmarks/real_peers.py: peers, where installed, prune a tiny Llama; the search on a peer of ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from conftest import World
from efficientllm.errors import UsageError
from efficientllm.models.loading import load_model
from efficientllm.models.space import build


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "real_peers.py"
    spec = importlib.util.spec_from_file_location("real_peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries (9 heads, 3 KV heads) and tied embeddings, as SmolLM2-135M has them."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "source")
    model: Any = build(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=72,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=8,
            intermediate_size=192,
            tie_word_embeddings=True,
        )
    )
    folder = tmp_path_factory.mktemp("source")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def kept(small: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
    """Which row of `large` every row of `small` is; each must be exactly one."""
    equal = (small[:, None] == large[None]).all(-1)
    assert bool((equal.sum(1) == 1).all())
    return equal.int().argmax(1)


def keep_ffn(model: Any, ratio: float) -> str:
    """A peer that leaves the first channels of every FFN."""
    config = model.config
    config.intermediate_size = width = config.intermediate_size - int(ratio * config.intermediate_size)
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight = torch.nn.Parameter(part.weight[:width].detach())
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :width].detach())
    return f"the first {width}"


@pytest.mark.parametrize("first", range(1, 13))
@pytest.mark.parametrize("period", [1, 3, 20])
def test_the_search_finds_the_first_that_fits_and_loads(peers: ModuleType, first: int, period: int) -> None:
    found = peers.smallest(12, lambda step: step >= first, lambda step: step % period == 0)
    assert found == next((step for step in range(first, 12) if step % period == 0), None)


def test_the_search_returns_only_what_fits_where_sizes_rise_again(peers: ModuleType) -> None:
    fitting = {3, 4, 7, 8, 9, 10, 11}
    found = peers.smallest(12, fitting.__contains__, lambda step: step not in {3, 4, 7})
    assert found == 8


def test_a_peer_lands_one_channel_within_the_target(
    peers: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.PEERS, "torch", keep_ffn)
    large = load(source)
    channel, target = 2 * 3 * 72, int(0.8 * large.num_parameters())
    facts = peers.prune_by_peer("torch", source, target, tmp_path)
    assert target - channel < facts["parameters"] <= target
    small = load(tmp_path)
    width = small.config.intermediate_size
    assert small.num_parameters() == facts["parameters"]
    assert facts["widths"]["intermediate_size"] == width
    assert (facts["how"], facts["version"]) == (f"the first {width}", torch.__version__)
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, large.model.layers[1].mlp.up_proj.weight[:width])
    with pytest.raises(UsageError, match="give a larger target"):
        peers.prune_by_peer("torch", source, 1000, tmp_path)


def test_a_peer_that_is_not_installed_is_named_with_the_extra(
    peers: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r"^torch-pruning cannot be imported .*efficientllm\[peers\]"):
        peers.prune_by_peer("torch-pruning", source, 10**6, tmp_path)


@pytest.mark.parametrize("name", ["optipfair", "torch-pruning"])
def test_what_a_peer_leaves_is_part_of_the_source_and_loads(
    peers: ModuleType, source: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip(name.replace("-", "_"), reason=f"{name} is not installed (the extra `peers`)")
    large = load(source)
    target = int(0.8 * large.num_parameters())
    facts = peers.prune_by_peer(name, source, target, tmp_path)
    small = load(tmp_path)
    assert facts["parameters"] == small.num_parameters() <= target
    assert facts["widths"] == {width: getattr(small.config, width) for width in peers.WIDTHS}
    assert small.config.use_cache == large.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path)("the model") == AutoTokenizer.from_pretrained(source)("the model")
    hidden = kept(small.model.embed_tokens.weight.T, large.model.embed_tokens.weight.T)
    for narrow, wide in zip(small.model.layers, large.model.layers, strict=True):
        new, old = narrow.self_attn, wide.self_attn
        rows = kept(new.q_proj.weight, old.q_proj.weight[:, hidden])
        heads = rows.view(-1, 8)
        assert torch.equal(heads, heads[:, :1] + torch.arange(8))
        queries = torch.bincount(heads[:, 0] // (3 * 8), minlength=3)  # of every KV head's group, in order
        assert set(queries.tolist()) == {small.config.num_attention_heads // 3}
        assert torch.equal(rows, rows.sort().values)
        for part in ("k_proj", "v_proj"):
            assert torch.equal(getattr(new, part).weight, getattr(old, part).weight[:, hidden])
        assert torch.equal(new.o_proj.weight, old.o_proj.weight[hidden][:, rows])
        channels = kept(narrow.mlp.gate_proj.weight, wide.mlp.gate_proj.weight[:, hidden])
        assert torch.equal(narrow.mlp.up_proj.weight, wide.mlp.up_proj.weight[channels][:, hidden])
        assert torch.equal(narrow.mlp.down_proj.weight, wide.mlp.down_proj.weight[hidden][:, channels])
    assert load_model(str(tmp_path)).num_parameters() == facts["parameters"]  # as `source` of a recipe is loaded
