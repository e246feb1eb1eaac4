"""The block of metadata at the top of a model card, which the hub reads, and what else a card says of its origin.

The keys are those of https://huggingface.co/docs/hub/model-cards; what is not known is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The block of a run's card. `facts` as for write_model_card; "license" is one of the hub's identifiers."""
    recipe = yaml.safe_load(str(facts.get("recipe", ""))) or {}
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    known = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["efficientllm", *(["pruned"] if kind_of(facts) == "pruned" else [])],
        "base_model": base_model(facts["source"]),
        "license": facts.get("license"),
        "datasets": _datasets(data, facts["source"].get("on_disk")),
    }
    return {key: value for key, value in known.items() if value}


def kind_of(facts: Mapping[str, Any]) -> str:
    """What a run has made: "pruned", "trained" (from its source's weights) or "random" (from none)."""
    if facts["result"]["parameters"] < facts["source"]["parameters"]:
        return "pruned"
    return "random" if facts["source"].get("init") == "random" else "trained"


def base_model(source: Mapping[str, Any]) -> str | None:
    """The source's repository on the hub; None where it is a folder."""
    return hub_id(str(source["path"]), source.get("on_disk"))


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


def license_of(folder: Path | str) -> str | None:
    """The licence that a model folder's own README.md states in its metadata; None where it states none."""
    try:
        block = re.match(r"---\r?\n(.*?)\r?\n---", (Path(folder) / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        stated = yaml.safe_load(block[1]) if block else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = stated.get("license") if isinstance(stated, Mapping) else None
    return found if isinstance(found, str) else None


def _datasets(data: Any, on_disk: Any) -> list[str]:
    """Hub ids among the recipe's training sources, each once."""
    ids = (hub_id(path, on_disk) for path, _ in _sources(data, "train") if not Path(path).suffix)
    return list(dict.fromkeys(found for found in ids if found))


def described_data(facts: Mapping[str, Any]) -> str:
    """The texts in a sentence, such as "Trained on `HuggingFaceTB/cosmopedia` (70%) and `notes.txt` (30%)"."""
    recipe = yaml.safe_load(str(facts.get("recipe", ""))) or {}
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    train, validation = (
        _names(_sources(data, part), facts["source"].get("on_disk")) for part in ("train", "validation")
    )
    if not train:
        return ""
    held_out = f"validated on {validation}" if validation else "validated on documents of it that were held out"
    return f"Trained on {train}; {held_out}."


def _sources(data: Any, part: str) -> list[tuple[str, float]]:
    """(path or hub id, weight) of each source."""
    sources = data.get(part) if isinstance(data, Mapping) else None
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
