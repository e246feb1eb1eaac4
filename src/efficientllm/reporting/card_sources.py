"""Names of models and texts as a published card may show them: hub ids, else the last component of a path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(path: str, on_disk: Any = None) -> str | None:
    """Return `path` when it names a repository on the hub (owner/name), None when it is local.

    on_disk: paths that were found on the disk when training began. By the time a card is written a folder may have
    gone, or the current one be another; only for runs of older versions, which have not noted it, that has to do.
    """
    if isinstance(on_disk, list):
        return path if path not in on_disk and _REPOSITORY.fullmatch(path) else None
    return path if _REPOSITORY.fullmatch(path) is not None and not Path(path).exists() else None


def title_of(source: Mapping[str, Any]) -> str:
    """The source's name: the last component of its path, or of its run's where that says just "model"."""
    path = PureWindowsPath(str(source["path"]))
    return last_component(str(path.parent if path.name == "model" and path.parent.name else path))


def last_component(path: str) -> str:
    name = PureWindowsPath(path).name  # understands both kinds of slash
    return name if name not in ("", ".", "..", "~") else "source"


def datasets_of(recipe: Any, on_disk: Any) -> list[str]:
    """Hub ids among the recipe's training sources, each once."""
    ids = (hub_id(path, on_disk) for path, _ in _sources(recipe, "train") if not Path(path).suffix)
    return list(dict.fromkeys(found for found in ids if found))


def described_data(recipe: Any, on_disk: Any) -> str:
    """The texts in a sentence, such as "Trained on `HuggingFaceTB/cosmopedia` (70%) and `notes.txt` (30%)"."""
    train, validation = (_names(_sources(recipe, part), on_disk) for part in ("train", "validation"))
    if not train:
        return ""
    held_out = f"validated on {validation}" if validation else "validated on documents of it that were held out"
    return f"Trained on {train}; {held_out}."


def _sources(recipe: Any, part: str) -> list[tuple[str, float]]:
    """(path or hub id, weight) of each source."""
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    sources = data.get(part) if isinstance(data, Mapping) else None
    if isinstance(sources, float) or (isinstance(sources, str) and re.fullmatch(r"[\d.]+\s*%?", sources)):
        return []  # the share of the text that is held out
    found = []
    for source in sources if isinstance(sources, list) else [sources]:
        path, weight = (source.get("path"), source.get("weight")) if isinstance(source, Mapping) else (source, 1.0)
        if path:
            windows = re.match(r"[A-Za-z]:[/\\]", str(path))
            found.append((str(path) if windows else str(path).split(":")[0], float(weight or 1.0)))
    return found


def _names(sources: list[tuple[str, float]], on_disk: Any) -> str:
    total = sum(weight for _, weight in sources)
    names = [
        f"`{hub_id(path, on_disk) or last_component(path)}`" + (f" ({weight / total:.0%})" if len(sources) > 1 else "")
        for path, weight in sources
    ]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def without_absolute_paths(recipe: str) -> str:
    """Replaces each absolute path that is a value of the recipe by its last component; the layout stays."""
    paths = {text for text in _strings(yaml.safe_load(recipe)) if re.match(r"[/~\\]|[A-Za-z]:[/\\]", text)}
    for path in sorted(paths, key=len, reverse=True):  # a folder must not be cut out of the paths inside it
        recipe = recipe.replace(path, last_component(path))
    return recipe


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)
