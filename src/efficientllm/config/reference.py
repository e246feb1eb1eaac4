"""Every key of a recipe with its default and meaning, read off the typed fields: the reference cannot go stale."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from efficientllm.config.fields import Section, Trait
from efficientllm.config.sections import Recipe

REQUIRED = "required"


class Key(NamedTuple):
    """One key. name: dotted, with [] where a list may stand; default: as a recipe would write it."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


def recipe_keys(
    section: type[Section] = Recipe, prefix: str = "", listed: set[type[Section]] | None = None
) -> Iterator[Key]:
    """All keys in the order of the recipe; those of a section follow the key that it stands under, and the keys of one
    that may stand under several follow the first of them. listed: sections whose keys have been."""
    listed = set() if listed is None else listed
    # Without validation: the defaults alone, each written as a recipe has it.
    written = section.model_construct().model_dump(mode="json", warnings=False)
    for name, field in section.model_fields.items():
        inner = list(_sections(field.annotation))
        default = written.get(name, None if field.is_required() else field.get_default(call_default_factory=True))
        yield Key(
            prefix + name,
            _shown(field, default, whole=bool(inner)),
            _sentence(field),
            tuple(_choices(field.annotation)),
        )
        several = "[]" if _is_list(field.annotation) else ""
        for each in inner:
            if each not in listed:
                listed.add(each)
                yield from recipe_keys(each, f"{prefix}{name}{several}.", listed)


def free_keys() -> dict[str, set[str]]:
    """By section, the keys that may change when a run is resumed."""
    sections = [each for field in Recipe.model_fields.values() for each in _sections(field.annotation)]
    return {each.section: free for each in sections if (free := each.having(Trait.FREE))}


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Sections that may stand under a key, however deep in unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(_is_list(part) for part in get_args(annotation))


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for part in get_args(annotation):
            yield from _choices(part)


def _shown(field: FieldInfo, default: Any, *, whole: bool) -> str:
    """The default as YAML; nothing for a section whose own keys have theirs."""
    if field.is_required():
        return REQUIRED
    if default is None:
        return "null"
    if whole and isinstance(default, dict):
        return ""
    return default if isinstance(default, str) else json.dumps(default, default=str)


def _sentence(field: FieldInfo) -> str:
    assert field.description, "every field of a recipe says what it is"
    return field.description
