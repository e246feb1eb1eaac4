"""Whatever is wrong with a recipe is said in one sentence that names the mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from efficientllm.config import DistillConfig, Recipe, load_recipe
from efficientllm.errors import UsageError

Refusal = Callable[..., str]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.lrr=1", "train.lrr is not a recipe key: did you mean train.lr?"),
        ("trian.lr=1", "trian is not a recipe key: did you mean train?"),
        ("run.zzz=1", "run.zzz is not a recipe key: the keys here are dir, checkpoint_every, keep, "),
        ("data.train={pth: b}", "data.train[0].pth is not a recipe key: did you mean data.train[0].path?"),
        ("prune.target={hiden: 4}", "prune.target.hiden is not a recipe key: did you mean prune.target.hidden?"),
        ("prune.floors.hiden=3", "prune.floors.hiden is not a recipe key: did you mean prune.floors.hidden?"),
        ("train.lr=null", "train.lr is missing: add it to the recipe"),
        ("train=null", "train is missing: add it to the recipe"),
        ("train=3", "train should be a mapping of keys to values, not 3"),
        ("train.lr=fast", "train.lr should be a valid number, not 'fast'"),
        ("train.lr=yes", "train.lr: true is not a number"),
        ("train.lr=.nan", "train.lr should be a finite number, not nan"),
        ("train.lr=0", "train.lr should be greater than 0, not 0"),
        ("train.tokens=lots", "train.tokens: 'lots' is not a count: write a whole number"),
        ("train.tokens=-5", "train.tokens: -5 is not a count: write a whole number that is not negative"),
        ("train.batch_tokens=0", "train.batch_tokens should be greater than 0, not 0"),
        ("train.schedule=wds", "train.schedule should be 'wsd', 'cosine' or 'constant', not 'wds'"),
        ("train.betas=[0.9, 1]", "train.betas[1] should be less than 1, not 1"),
        ("train.betas=0.9", "train.betas should be a list, not 0.9"),
        ("train.device=gpu", "train.device: 'gpu' is no device: write auto, cpu, cuda, cuda:1, mps or xpu"),
        ("train.warmup=90%", "train.warmup (90%) and train.decay (20%) together are longer than the run"),
        ("data.train=[]", "data.train should have at least 1 item, not 0"),
        (
            "data.train={path: org/d:n, name: m}",
            "data.train[0].name is gone: write it into the path, such as",
        ),
        ("data.validation={path: a, split: m}", "data.validation[0].split is gone: write it into the path"),
        ("prune.align={hidden: 64}", "prune.align: give one multiple for both widths, such as prune.align=64"),
        ("data.sequence_length=4", "data.sequence_length should be greater than or equal to 8, not 4"),
        ("data.validation=60%", "data.validation should be less than 0.5, not '60%'"),
        ("prune.target=100%", "prune.target: '100%' is no size to prune to: write a parameter count such as 469M"),
        ("prune.target={flop: 40%}", "prune.target.flop is not a recipe key: did you mean prune.target.flops?"),
        ("prune.target={flops: 120%}", "prune.target.flops: '120%' is no size to reach: write a ratio such as 50%"),
        ("prune.target={latency: 12}", "prune.target.latency: 12 is no latency to reach: write a ratio such as 50%"),
        ("prune.target={flops: 40%, latency: 40%}", "a size to prune to is in one cost: give one of active, flops"),
        (
            "prune={target: {flops: 40%}, cost: flops, ladder: [{flops: 80%}, 60%]}",
            "prune.cost is flops, but prune.ladder[1] is in params",
        ),
        ("prune={target: 40%, ladder: [{flops: 80%}]}", "prune.ladder[0] is in flops, but prune.cost counts params"),
        ("prune.target={flops: 40%}", "prune.target is in flops, but prune.cost counts params: set prune.cost: flops"),
        ("prune.cost=flops", "prune.cost is flops, but prune.target is in params: write it as {flops: 40%}"),
        ("prune.latency_table=a.json", "prune.latency_table has no effect with prune.cost params: remove it"),
        ("prune.cost=energy", "prune.cost should be 'params', 'active', 'flops', 'kv-cache' or 'latency', not"),
        (
            "train.batch_tokens=1000",
            "train.batch_tokens (1000) is less than one row of data.sequence_length (1024): raise it to a row or more",
        ),
        ("prune.target={}", "prune.target names no width: give one or more of layers, hidden, heads"),
        ("prune.target.hidden=8", "override 'prune.target.hidden=8': prune.target has no keys in this recipe, so set"),
        ("prune.saliency=taylor", "prune.saliency: there is no saliency criterion 'taylor'; did you mean 'taylor-"),
        ("prune.saliency={fnn: flap}", "prune.saliency: 'fnn' is no pruning type here; choose among attention"),
        ("prune.saliency={ffn: 3}", "prune.saliency: there is no saliency criterion '3'"),
        (
            "prune.saliency=[flap]",
            "prune.saliency: ['flap'] is no criterion: write a name such as flap, or one by type",
        ),
        ("prune.bound=2", "prune.bound: 2 is not a fraction: write a share such as 2% or 0.02"),
        ("prune.align=Auto", "prune.align: 'Auto' is no alignment: write auto, or a multiple such as 64"),
        (
            "prune.types=[fnn]",
            "prune.types[0] should be 'attention', 'attention_query', 'ffn', 'stem', 'depth', 'expert', "
            "'expert_ffn' or 'vocab'",
        ),
        ("prune.types=[ffn, ffn]", "prune.types names ffn more than once: drop the repetition"),
        (
            "train.warmup=50%",
            "pruning starts at the end of train.warmup (50%), which must come before prune.end (30M tokens)",
        ),
        ("prune.start=60%", "prune.start (60%) must come before prune.end (30M tokens)"),
        ("prune.end=70M", "prune.end (70M) lies beyond train.tokens (60M): lower it"),
        ("prune.end=110%", "prune.end: '110%' is no place in a run: write a share of it such as 15% or 0.15"),
        ("run.checkpoint_every=0", "run.checkpoint_every: an interval cannot be zero: write one such as 10% or 5M"),
        ("run.dir=2024-01-01", "run.dir should be a valid string, not datetime.date(2024, 1, 1)"),
        ("train.lr", "override 'train.lr' should read section.key=value, such as train.lr=1e-3"),
        (".lr=3", "override '.lr=3' should read section.key=value"),
        ("source.lr=3", "override 'source.lr=3': source has no keys in this recipe"),
        ("train.lr=[1", "the value in override 'train.lr=[1' is not valid YAML at line 1, column 3: "),
        ("run.dir=2024-13-01", "the value in override 'run.dir=2024-13-01' is not valid YAML: month must be"),
        (["prune.every=1", "prune.end=5%"], "prune.end has no effect beside prune.every, which sets the pace"),
        (["prune.every=1", "prune.curve=cubic"], "prune.curve has no effect beside prune.every"),
        (["prune.every=1", "prune.start=60M"], "prune.start (60M) must come before the end of the run"),
        (
            ["prune.mode=iterative", "prune.end=5%"],
            "prune.end has no effect with prune.mode iterative, which sets",
        ),
        (
            ["prune.saliency={depth: magnitude, ffn: flap}"],
            "prune.saliency.depth has no effect: depth is not in prune.types",
        ),
        (["prune.mode=one-shot", "prune.bound=5%"], "prune.bound has no effect with prune.mode one-shot"),
        (["train.schedule=cosine", "train.decay=10%"], "train.decay has no effect with train.schedule cosine"),
        (["train.schedule=constant", "train.min_lr=0"], "train.min_lr has no effect with train.schedule constant"),
        (
            ["distill.weight=1", "prune.saliency={ffn: taylor-element}"],
            "distill.weight 1 leaves no gradient to prune by, since at first the source is its own teacher",
        ),
        (["distill.hidden=1", "distill.samples=50"], "distill.hidden needs a teacher that is"),
        (
            ["distill.hidden=1", "prune.rotate=auto"],
            "distill.hidden compares residual channels with the teacher's, and prune.rotate makes others of them",
        ),
    ],
)
def test_bad_values_are_refused_in_one_sentence(refusal: Refusal, overrides: str | list[str], message: str) -> None:
    """And options that have no effect beside others."""
    assert refusal(*([overrides] if isinstance(overrides, str) else overrides)).startswith(message)


def test_a_teacher_serves_beside_what_it_does_not_harm(load: Callable[..., Recipe]) -> None:
    """At first the source is its own teacher, and the loss of such a one alone has no gradient for scores."""
    for key in ("weight", "hidden"):
        assert load(f"distill.{key}=1").distill == DistillConfig(**{key: 1.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: it should have the keys source, data, train and run"),
        ("- a", "is not a mapping: it should have the keys"),
        ("a: [", "is not valid YAML at line 1, column 5: "),
        ("a: 1\nb: 2\na: 3", "is not valid YAML at line 3, column 1: a is given twice"),
        ("a: \x00", "is not valid YAML: special characters are not allowed"),
        ("a: !!python/name:os.system x", "is not valid YAML at line 1, column 4: could not determine a constructor"),
        ("[1]: 2", "is not valid YAML at line 1, column 1: found unhashable key"),
        ("{}", "source is missing: add it to the recipe"),
        ("1: 2", "1 is not a recipe key: the keys here are source, tokenizer, init"),
        ("'': 2", " is not a recipe key: the keys here are source, tokenizer, init"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(refusal: Refusal, text: str, message: str) -> None:
    assert message in refusal(text=text)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    for path, message in [
        (tmp_path / "none.yaml", f"there is no recipe {tmp_path / 'none.yaml'}: check the path"),
        (tmp_path, f"recipe {tmp_path} cannot be read (Is a directory): give a readable YAML file"),
        (binary, f"recipe {binary} is not text in UTF-8: give a YAML file"),
    ]:
        with pytest.raises(UsageError) as error:
            load_recipe(path)
        assert str(error.value) == message
