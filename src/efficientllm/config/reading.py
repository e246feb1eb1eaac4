"""Recipes from and to YAML. Precedence: defaults < recipe file < section.key=value overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from efficientllm.config.fields import LEAVE_OUT_IDLE
from efficientllm.config.gone import without_gone
from efficientllm.config.sections import Recipe
from efficientllm.errors import UsageError


class _Loader(yaml.SafeLoader):
    """The safe loader, except that a key given twice is refused: YAML would drop the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:i]):
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
        return node


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, dumped: bool = False) -> Recipe:
    """The recipe in a YAML file, with overrides such as "train.lr=1e-3" whose values are read as YAML.

    An override to null restores the default. dumped: we wrote the file, perhaps in an older version; keys that went
    since may stand in it with what they were. So they may in a run folder's config.yaml, which users are told to give
    to `efficientllm prune`. Raises UsageError for anything a user can get wrong.
    """
    path = Path(path)
    data = _read(path)
    if dumped or path.name == "config.yaml":
        data = without_gone(data)
    for text in overrides:
        _override(data, text)
    return Recipe.model_validate(data)


def effective_recipe(content: Mapping[str, Any]) -> Recipe:
    """The recipe of these keys without those that have no effect beside the others, which `load_recipe` refuses."""
    found = Recipe.model_validate(content, context=LEAVE_OUT_IDLE)
    return Recipe.model_validate(found.model_dump(mode="json"))


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every field that has an effect, sizes as people write them; it loads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UsageError(f"{what} is not valid YAML{where}: {problem}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no recipe {path}: check the path") from None
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read ({error.strerror}): give a readable YAML file") from None
    except UnicodeDecodeError:
        raise UsageError(f"recipe {path} is not text in UTF-8: give a YAML file") from None
    data = _parse(text, f"recipe {path}")
    if not isinstance(data, dict):
        found = "is empty" if data is None else "is not a mapping"
        raise UsageError(f"recipe {path} {found}: it should have the keys source, data, train and run")
    return data


def _override(data: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    *sections, key = keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"override {text!r} should read section.key=value, such as train.lr=1e-3")
    node = data
    for depth, section in enumerate(sections, start=1):
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            whole = ".".join(sections[:depth])
            raise UsageError(f"override {text!r}: {whole} has no keys in this recipe, so set {whole} as a whole")
    node[key] = _parse(value, f"the value in override {text!r}")
