"""The block of metadata at the top of a model card, which the hub reads, and the table of an evaluation.

The keys are those of https://huggingface.co/docs/hub/model-cards; what is not known is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
        "base_model": hub_id(str(facts["source"]["path"])),
        "license": facts.get("license"),
        "datasets": _datasets(data),
    }
    return {key: value for key, value in known.items() if value}


def kind_of(facts: Mapping[str, Any]) -> str:
    """What a run has made: "pruned", "trained" (from its source's weights) or "random" (from none)."""
    if facts["result"]["parameters"] < facts["source"]["parameters"]:
        return "pruned"
    return "random" if facts["source"].get("init") == "random" else "trained"


def hub_id(path: str) -> str | None:
    """Return `path` when it names a repository on the hub (owner/name), None when it is a local folder."""
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


def _datasets(data: Any) -> list[str]:
    """Hub ids among the recipe's training sources, each once."""
    sources = data.get("train") if isinstance(data, Mapping) else None
    sources = sources if isinstance(sources, list) else [sources]
    paths = [str(source.get("path")) if isinstance(source, Mapping) else str(source) for source in sources]
    ids = (hub_id(path.split(":")[0]) for path in paths if not Path(path).suffix)
    return list(dict.fromkeys(found for found in ids if found))


def evaluation_table(results: Any) -> str | None:
    """Task, metric and value of an evaluation's results; None where no number is found in them.

    Read are {task: number}, {task: {metric: number}} and lm-evaluation-harness's {"results": {...}} with its
    "acc,none" and standard errors, the latter of which are shown beside the value.
    """
    tasks = results.get("results", results.get("tasks", results)) if isinstance(results, Mapping) else None
    if not isinstance(tasks, Mapping):
        return None
    rows = [row for task, values in tasks.items() for row in _rows(str(task), values)]
    if not rows:
        return None
    return "\n".join(["| task | metric | value |", "| --- | --- | ---: |", *(f"| {' | '.join(row)} |" for row in rows)])


def _rows(task: str, values: Any) -> Iterator[tuple[str, str, str]]:
    if _is_number(values):
        yield task, "", f"{values:.4f}"
    elif isinstance(values, Mapping):
        for metric, value in values.items():
            name, _, variant = str(metric).partition(",")
            if not _is_number(value) or name.endswith("_stderr") or isinstance(value, int):
                continue
            error = values.get(f"{name}_stderr,{variant}" if variant else f"{name}_stderr")
            yield task, name, f"{value:.4f}" + (f" +- {error:.4f}" if _is_number(error) else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
