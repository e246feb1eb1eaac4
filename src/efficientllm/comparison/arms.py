"""What is compared: arms by name, and the recipe that each one runs.

    BASE[:CRITERION][@loop][+uncorrected][+distill]

    loop       the recipe as it is written        one-shot   all units at once, then the same training
    fixed      widths in the source's proportions  iterative  step by step with the weights at rest, then training
    scratch    the loop's final shape, fresh weights   dense  the source trained on, unpruned: the ceiling

`@loop` gives one-shot, iterative and loop arms the shape that `loop` found with the same seed, so that what the
architecture brings and what gradual pruning brings can be told apart. Whatever prunes corrects as the recipe says;
`+uncorrected` does not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficientllm.config import PruneConfig, Recipe, Trait, effective_recipe
from efficientllm.errors import UsageError
from efficientllm.pruning.costs import Cost, Params
from efficientllm.pruning.criteria import criterion
from efficientllm.pruning.groups import Space
from efficientllm.pruning.shapes import proportional_widths
from efficientllm.pruning.widths import Widths

DEFAULT_ARMS = (
    "loop",
    "loop+uncorrected",
    "loop+distill",
    "one-shot",
    "one-shot@loop",
    "one-shot@loop+uncorrected",
    "fixed",
    "scratch",
    "scratch+distill",
    "dense",
)
_PRUNING = ("loop", "one-shot", "iterative", "fixed")
_BASES = (*_PRUNING, "scratch", "dense")
_NAME = re.compile(r"(?P<base>[a-z-]+)(?::(?P<criterion>[a-z0-9-]+))?(?P<shape>@loop)?(?P<extras>(?:\+[a-z-]+)*)")
_EXTRAS = ("uncorrected", "distill")


@dataclass(frozen=True)
class Arm:
    """One thing to compare. criterion None: the recipe's. loops_shape: its widths are those that `loop` found."""

    name: str
    base: str
    criterion: str | None = None
    loops_shape: bool = False
    uncorrected: bool = False
    distilled: bool = False

    @property
    def needs_loop(self) -> bool:
        """Whether it must wait for the loop of its seed."""
        return self.loops_shape or self.base in ("scratch", "fixed")

    @property
    def prunes(self) -> bool:
        return self.base in _PRUNING


def parse_arm(name: str) -> Arm:
    """An arm from its name. Raises UsageError that names the nearest arm, base or criterion."""
    match = _NAME.fullmatch(name)
    extras = match["extras"].split("+")[1:] if match else []
    if match is None or match["base"] not in _BASES or any(each not in _EXTRAS for each in extras):
        near = difflib.get_close_matches(name, [*DEFAULT_ARMS, "iterative", "one-shot:wanda"], n=1, cutoff=0.0)[0]
        raise UsageError(
            f"'{name}' is no arm: did you mean {near}? Arms are BASE[:CRITERION][@loop][+uncorrected][+distill] with "
            f"BASE one of {', '.join(_BASES)}"
        )
    arm = Arm(
        name, match["base"], match["criterion"], bool(match["shape"]), "uncorrected" in extras, "distill" in extras
    )
    if len(set(extras)) < len(extras):
        raise UsageError(f"arm '{name}' says the same thing twice: drop the repetition")
    if not arm.prunes and (arm.criterion or arm.loops_shape or arm.uncorrected):
        raise UsageError(f"arm '{name}' prunes nothing: only +distill can be added to {arm.base}")
    if arm.base == "fixed" and arm.loops_shape:
        raise UsageError(f"arm '{name}' asks for two shapes: write fixed, or loop@loop")
    if arm.criterion:
        try:
            criterion(arm.criterion)
        except ValueError as error:
            raise UsageError(f"arm '{name}': {error}") from error
    return arm


def parse_arms(names: Sequence[str]) -> list[Arm]:
    """Arms in the order asked for, `loop` first since every difference is taken to it (added where it was left out)."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice:
        raise UsageError(f"arm '{twice}' is asked for twice: drop the repetition")
    return [parse_arm(name) for name in dict.fromkeys(["loop", *names])]


def arm_recipe(
    arm: Arm,
    recipe: Recipe,
    space: Space,
    *,
    seed: int,
    lr: float,
    tokens: int,
    folder: str,
    loop: Mapping[str, Any] | None,
    cost: Cost | None = None,
) -> Recipe:
    """What one arm runs: the user's recipe with seed, peak rate, tokens and run folder, and the arm's own settings.

    space: of the source. loop: summary of the loop with this seed, where the arm needs it. cost: what the recipe prunes
    by, in which `fixed` is to be no dearer than the loop; default: parameters.
    Raises UsageError where the result is no valid recipe, e.g. for a warm-up longer than the run.
    """
    content = recipe.model_dump(mode="json")
    content["train"] |= {"seed": seed, "lr": lr, "tokens": tokens}
    content["run"] |= {"dir": folder, "report": False}
    prune = content.pop("prune") or {}
    distill = content.pop("distill", None) or {}
    if arm.distilled:
        content["distill"] = distill | {"teacher": distill.get("teacher") or recipe.source}
    if arm.needs_loop:
        assert loop is not None, "this arm waits for the loop"
    if arm.base == "scratch":
        assert loop is not None
        tokenizer = recipe.tokenizer or recipe.source
        content |= {"source": loop["result"]["path"], "tokenizer": tokenizer, "init": "random"}
    if arm.prunes:
        content["prune"] = _prune_section(arm, prune, space, loop, cost or Params(space))
    return effective_recipe(content)


def _prune_section(
    arm: Arm, prune: dict[str, Any], space: Space, loop: Mapping[str, Any] | None, cost: Cost
) -> dict[str, Any]:
    """The user's prune section, but for what arms set anew."""
    made = {key: value for key, value in prune.items() if key not in PruneConfig.having(Trait.ARM)}
    made["correction"] = "none" if arm.uncorrected else prune["correction"]
    made["mode"] = "loop" if arm.base == "fixed" else arm.base
    made["saliency"] = arm.criterion or prune["saliency"]
    made["target"] = prune["target"]
    if arm.base != "fixed":
        made["cost"] = prune["cost"]
    if loop is not None and arm.needs_loop:
        found = loop["result"]["widths"]
        widths = found
        if arm.base == "fixed":
            try:
                shape = proportional_widths(space, cost(Widths(**found)), cost)
            except ValueError as error:
                raise UsageError(str(error)) from error
            widths = {name: shape.record()[name] for name in found}
        layers = {"layers"} if widths["layers"] == space.widths.layers else set()
        made["target"] = {name.removeprefix("expert_"): each for name, each in widths.items() if name not in layers}
    return made
