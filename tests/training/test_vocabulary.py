"""Rows of the vocabulary cut out of a run, and what that is said to cost beside what it does cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from efficientllm.config import Recipe
from efficientllm.demo.corpus import train_tokenizer
from efficientllm.models.flops import forward_flops
from efficientllm.models.space import space_of
from efficientllm.models.vocabulary import cut_tokenizer
from efficientllm.pruning.decision import Standing
from efficientllm.pruning.tokens import KEPT, Tokens
from efficientllm.training import vocabulary
from efficientllm.training.gradient import Precision, next_tokens
from efficientllm.training.run_plan import run_plan
from efficientllm.training.snapshot import Snapshot, cut_tokens, model_of
from efficientllm.training.state import TrainState, capture
from efficientllm.training.step import OwnBatches
from efficientllm.training.vocabulary import Vocabulary, asking_flops, expected, sizes_below, with_tokens


def trained(family: str, **changes: object) -> tuple[Any, Snapshot]:
    """A model with moments, and the run as a snapshot."""
    model = tiny_model(family, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.arange(24).view(2, 12)
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    return model, capture(TrainState(model, optimizer, space_of(model.config), None))


@pytest.mark.parametrize("family", ["llama-mha-tied", "llama-gqa", "gemma2-gqa-tied", "qwen3-moe-gqa", "granite-gqa"])
def test_what_is_left_has_the_same_logits_and_moments(family: str) -> None:
    model, snapshot = trained(family)
    first = torch.tensor([each for each in range(61) if each % 3])
    cut = cut_tokens(snapshot, first)
    again = cut_tokens(cut, torch.arange(0, len(first), 2))
    kept = first[::2]
    assert torch.equal(again.pruner_tensors[KEPT], kept)
    narrow = model_of(again, "cpu").eval()
    assert narrow.config.vocab_size == len(narrow.get_input_embeddings().weight) == len(kept)
    assert narrow.config.eos_token_id is None  # 0 has fallen
    ids = torch.arange(len(kept))[None]
    with torch.no_grad():
        logits, whole = narrow(input_ids=ids).logits, model.eval()(input_ids=kept[None]).logits[..., kept]
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
    untouched = 0
    for name, moments in snapshot.moments.items():
        cuts = "embed_tokens" in name or "lm_head" in name
        for key, value in moments.items():
            assert torch.equal(again.moments[name][key], value[kept] if cuts and value.ndim else value)
        untouched += not cuts
    assert untouched


def test_parameters_and_flops_count_what_is_left() -> None:
    for family, matrices in (("llama-mha-tied", 1), ("llama-gqa", 2)):
        model, snapshot = trained(family)
        narrow = model_of(cut_tokens(snapshot, torch.arange(45)), "cpu")
        before, after = space_of(model.config), space_of(narrow.config)
        assert before.num_params() - after.num_params() == matrices * 16 * 40
        assert after.num_params() == sum(weight.numel() for weight in narrow.parameters())
        assert forward_flops(before, 1, 8).head - forward_flops(after, 1, 8).head == 2 * 8 * 16 * 40


def test_sizes_are_aligned_and_worth_a_new_encoding() -> None:
    space = space_of(tiny_model("llama-mha-tied", vocab_size=4096).config)
    sizes = sizes_below(space, 4096, 1300, 4096)
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 128 == 0 and 1300 <= size < 4096 for size in sizes)
    assert 4 <= len(sizes) <= 9
    per_token = 40 / float(space.num_params())
    assert all((wide - narrow) * per_token > 0.015 for wide, narrow in zip([4096, *sizes], sizes, strict=False))


def test_it_is_asked_at_first_and_whenever_a_fifth_has_fallen() -> None:
    tokens = Tokens()
    assert [tokens.ask(size) for size in (100, 99, 81, 80, 79, 64)] == [True, False, False, True, False, True]
    tokens.kept = torch.arange(3)
    saved = Tokens.of(*tokens.state())
    assert saved.asked_at == 64
    assert saved.kept is tokens.kept


@pytest.mark.parametrize("prune", [{"target": 0.4}, {"target": {"flops": "60%"}, "cost": "flops"}])
def test_sizes_and_floors_stay_those_of_the_whole_source(prune: dict[str, object]) -> None:
    """Also of a milestone, and after a second fall; a share of what is left would be another size."""
    types = ["attention", "attention_query", "ffn", "stem", "vocab"]
    milestone = {"flops": "80%"} if "cost" in prune else 0.8
    recipe = Recipe.model_validate(
        {
            "source": "x",
            "data": {"train": "x", "validation": "x", "sequence_length": 32},
            "train": {"tokens": 24 * 256, "batch_tokens": 256, "lr": 1e-2},
            "prune": prune | {"types": types, "ladder": [milestone], "end": "50%"},
            "run": {"dir": "x"},
        }
    )
    plan = run_plan(recipe, tiny_model("llama-gqa", vocab_size=256, tie_word_embeddings=True).config)
    once = with_tokens(plan, torch.arange(224))
    forecast, rows = expected(plan)
    if "cost" not in prune:  # asked at the whole size, and each time that a fifth has gone on the way to 40 %
        assert asking_flops(plan) == 5 * 2 * forward_flops(plan.space, 2 * vocabulary.TEXT_TOKENS // 32, 16).total
    assert rows < 256
    assert plan.pruning
    for other in (once, with_tokens(once, torch.arange(200)), forecast):
        assert other.pruning
        assert other.source.vocab_size < 256
        assert [each.target for each in other.pruning.milestones] == [each.target for each in plan.pruning.milestones]
        assert other.pruning.feasible.floors == plan.pruning.feasible.floors
        assert other.pruning.schedule == plan.pruning.schedule


def test_a_target_in_widths_stays_one() -> None:
    """Of a recipe without vocab, which goes on from a run whose tokens fell."""
    recipe = Recipe.model_validate(
        {
            "source": "x",
            "data": {"train": "x", "validation": "x", "sequence_length": 32},
            "train": {"tokens": 24 * 256, "batch_tokens": 256, "lr": 1e-2},
            "prune": {"target": {"hidden": 24, "intermediate": 32}, "end": "50%"},
            "run": {"dir": "x"},
        }
    )
    plan = run_plan(recipe, tiny_model("llama-gqa", vocab_size=256, tie_word_embeddings=True).config)
    assert plan.pruning
    after = with_tokens(plan, torch.arange(200)).pruning
    assert after
    assert after.feasible.shape() == plan.pruning.feasible.shape()


def test_missing_tokens_have_no_logit_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("gemma2-gqa-tied").eval()  # its logits are capped
    lines, lost = torch.randint(40, (2, 9, 2)), torch.arange(61) >= 40
    hidden = model.model(input_ids=lines[..., 0]).last_hidden_state
    logits = model(input_ids=lines[..., 0]).logits[..., :40].flatten(0, 1)
    labels = next_tokens(lines).flatten()
    assert len(hidden.flatten(0, 1)) == len(labels)
    wanted = nn.functional.cross_entropy(logits, labels, reduction="sum")
    for chunk in (5, 1024):
        monkeypatch.setattr(vocabulary, "CHUNK_TOKENS", chunk)
        with torch.no_grad():
            loss = vocabulary._loss(model, lines, lost, Precision("cpu", bf16=False))
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("at_rest", [False, True])
def test_nothing_is_left_to_a_step_that_does_not_come(at_rest: bool) -> None:
    """A milestone and the target take a step each."""
    plan: Any = SimpleNamespace(milestones=(1, 2), at_rest=at_rest)
    ready: Any = SimpleNamespace(choose=lambda *_: 7)
    chosen = []
    for step, milestone in ((2, 0), (3, 0), (3, 1), (4, 1)):
        state: Any = SimpleNamespace(step=step if at_rest else step + 1)  # which is counted before the others prune
        passes: Any = SimpleNamespace(state=state, _plan=plan, _steps=5, _vocabulary=ready)
        chosen.append(OwnBatches.vocabulary(passes, cast(Any, None), Standing(cast(Any, None), 0, milestone)))
    assert chosen == [7, None, 7, None]


WORDS = ["the thread", "that was", "brought", "by strength", "seldom", "breaks", "threads of", "thought"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Vocabulary, TrainState, Tensor]:
    """A model that has learnt a text, whose first words are often and whose last ones are rare; rows of the text."""
    folder, chooser = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    rarity = np.asarray([0.5**place for place in range(len(WORDS))])
    text = " ".join(chooser.choice(WORDS, 6000, p=rarity / rarity.sum()))
    (folder / "text.jsonl").write_text(f'{{"text": "{text}"}}\n')
    tokenizer = train_tokenizer([folder / "text.jsonl"], 330, folder / "tokenizer")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    model: Any = tiny_model("llama-gqa", vocab_size=330)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.2 if weight.ndim > 1 else 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        part = rows[step * 16 % len(rows) :][:16]
        model(input_ids=part, labels=part).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    known = Vocabulary(
        cast(Recipe, None),
        model.config,
        tokenizer,
        source_rows=330,
        held=[0],
        counts=lambda: np.bincount(rows.flatten().numpy(), minlength=330).astype(float),
        precision=Precision("cpu", bf16=False),
    )
    return known, TrainState(model.eval(), optimizer, space_of(model.config), None), rows


def test_the_price_is_what_encoding_anew_costs(
    toy: tuple[Vocabulary, TrainState, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted from counts and one look in the smallest vocabulary; measured on a model that is really cut, in nats
    for each token of the text."""
    known, state, rows = toy
    size = 330 - int((known.falling.costs.cumsum() <= 0.2).sum())
    assert size < 320
    monkeypatch.setattr(vocabulary, "TEXT_TOKENS", rows.numel() // 2)
    vars(known)["milestones"] = {size: ()}
    step: Any = SimpleNamespace(rows=lambda use: SimpleNamespace(parts=[(part, True) for part in rows.split(32)]))
    rate = known.rate(state, step)
    predicted = rate * known.falling.cost(330 - size)

    kept = known.kept(size)
    narrow = model_of(cut_tokens(capture(state), kept), "cpu").eval()
    cut: Any = cut_tokenizer(known.tokenizer, kept)
    texts = [known.tokenizer.decode(row[:16].tolist()) for row in rows]
    own = cast(Any, known.tokenizer)
    whole, without = (
        [_nats(model, one(text)["input_ids"], int(one.eos_token_id)) for text in texts]
        for model, one in ((state.model, own), (narrow, cut))
    )
    tokens_whole = sum(len(own(text)["input_ids"]) for text in texts)
    more = sum(len(cut(text)["input_ids"]) for text in texts) - tokens_whole
    assert rate == pytest.approx((sum(without) - sum(whole)) / more, rel=1e-3)
    assert predicted == pytest.approx((sum(without) - sum(whole)) / tokens_whole, rel=0.25)


@torch.no_grad()
def _nats(model: Any, ids: list[int], end: int) -> float:
    row = torch.tensor([[end, *ids]])
    log = model(input_ids=row).logits.double().log_softmax(-1)
    return -float(log[0, :-1].gather(1, row[0, 1:, None]).sum())


def test_too_few_splits_are_priced_at_the_mean(toy: tuple[Vocabulary, TrainState, Tensor]) -> None:
    known, state, rows = toy
    size = 330 - int((known.falling.costs == 0.0).sum())
    vars(known)["milestones"] = {size: ()}
    step: Any = SimpleNamespace(rows=lambda use: SimpleNamespace(parts=[(rows[:32], True)]))
    before = state.flops.looks
    texts = [known.tokenizer.decode(row[:16].tolist()) for row in rows[:32]]
    whole = [_nats(state.model, cast(Any, known.tokenizer)(text)["input_ids"], 0) for text in texts]
    tokens = sum(len(cast(Any, known.tokenizer)(text)["input_ids"]) for text in texts)
    assert known.rate(state, step) == pytest.approx(sum(whole) / tokens, rel=1e-4)
    assert state.flops.looks > before
