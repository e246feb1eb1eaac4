"""Imports go one way (docs/architecture.md), and those of the scripts beside the package find what they name."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "efficientllm"
SCRIPTS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])

# Room -> rooms of ours that it may import. A room may always import itself.
ALLOWED = {
    "errors": set(),
    "sizes": set(),
    "pruning": set(),
    "files": {"errors"},
    "cache": {"errors"},
    "models": {"errors", "files", "cache", "pruning"},
    "config": {"errors", "sizes", "pruning"},
    "data": {"errors", "files", "cache", "config"},
    "distributed": {"errors", "config", "pruning"},
    "training": {"errors", "config", "models", "pruning", "distributed"},
    "checkpoint": {"errors", "files", "models", "training", "distributed", ""},
    "evaluation": {"errors", "data", "models", "pruning", "training", "distributed", "reporting"},
    "reporting": {"errors", "files", "sizes", "pruning"},
    "export": {"errors", "files", "sizes", "models", "checkpoint", "reporting", ""},
    "jobs": {
        "errors", "files", "sizes", "cache", "config", "data", "models", "pruning", "distributed", "training",
        "checkpoint", "evaluation", "reporting", "",
    },
    "planning": {"errors", "sizes", "config", "models", "pruning", "distributed", "training"},
    "comparison": {
        "errors", "files", "sizes", "config", "models", "pruning", "training", "evaluation", "planning", "jobs",
        "reporting", "",
    },
    "benching": {"errors", "models", "export", "pruning", "reporting"},
    "demo": {"errors", "files", "sizes", "config", "models", "checkpoint", "jobs", "reporting"},
    "library": {"config", "models", "pruning", "distributed", "training", "checkpoint"},
    "trainer_callback": {"config", "library"},
    "cli": {
        "errors", "files", "sizes", "config", "models", "pruning", "evaluation", "reporting", "export", "planning",
        "jobs", "distributed", "training", "comparison", "demo", "benching", "",
    },
    "__main__": {"cli"},
    "": {"library", "trainer_callback"},
}  # fmt: skip


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name for name in names if name.split(".")[0] == "efficientllm"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"{room} is a new room: say in docs/architecture.md and here what it may import"
    for module in imported(path):
        parts = module.split(".")
        other = parts[1] if len(parts) > 1 else ""
        assert other == room or other in ALLOWED[room], f"{room} may not import {module}"


def test_pruning_is_pure() -> None:
    """torch and the standard library only."""
    for path in (SOURCE / "pruning").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                foreign = {"transformers", "datasets", "numpy", "scipy", "pydantic"}
                assert (module or "").split(".")[0] not in foreign, path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_finds_what_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its head and within its functions. Those of examples/ itself act when imported: tests/test_examples.py."""
    ours = {"efficientllm", *(each.stem for each in path.parent.glob("*.py"))}
    for name in ours - {"efficientllm"}:  # modules of tests may be called alike: none is taken for a script, or left
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.syspath_prepend(path.parent)
    if path.parent.name != "examples":
        import_module(path.stem)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ours:
            module = import_module(str(node.module))
            absent = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not absent, f"{node.module} has no {absent}"
