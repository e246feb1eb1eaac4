"""benchmarks/gpu.py on toy models, where only torch and transformers can be imported; its bad input and its clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ["pydantic", "pydantic_core", "datasets", "typer", "pyarrow", "matplotlib", "tensorboard"]
RUN = """
import runpy, sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call(*argv: str, absent: list[str] = ABSENT) -> subprocess.CompletedProcess[str]:
    code = RUN.format(absent=absent, argv=[str(ROOT / "benchmarks" / "gpu.py"), *argv])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.slow
def test_every_part_runs_without_the_packages_of_recipes(tmp_path: Path) -> None:
    done = call("--tiny", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    parts = found["models"]["toy"]
    assert list(parts) == ["shape", "step", "compile", "trainer", "loop", "compaction", "widths"]
    assert not [name for name, part in parts.items() if "left_out" in part], parts
    step = parts["step"]
    assert set(step["ways"]) == {"plain", "saliency", "event", "correction", "plain loss", "chunked loss"}
    assert step["ratios"]["event"]["median"] > 0
    assert step["agreement"]["loss"] < 1e-6
    assert step["agreement"]["gradient"] < 1e-5
    assert parts["compile"]["graphs"] >= 1
    before, after = parts["compaction"]["parameters"]
    assert 0.5 * before < after < before
    aligned, odd = parts["widths"]["shapes"].values()
    assert odd["parameters"] == pytest.approx(aligned["parameters"], rel=0.02)
    assert "| toy | widths | unaligned / aligned |" in done.stdout
    assert "<= 1.02" in done.stdout


@pytest.mark.slow
def test_what_is_left_out_says_why(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = call("--tiny", "--only", "trainer", "loop", "--json", str(path), absent=[*ABSENT, "accelerate"])
    assert done.returncode == 0, done.stderr[-3000:]
    parts = json.loads(path.read_text())["models"]["toy"]
    assert "accelerate" in parts["trainer"]["left_out"]
    assert "loop" in parts["loop"]["ways"]


def test_no_time_is_a_reason() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu
    finally:
        sys.path.pop(0)

    def endless() -> dict[str, object]:
        while True:
            pass

    found = gpu.attempt(gpu.Clock(60), gpu.LEAST + 0.1, lambda: {"fine": 1})
    assert found["fine"] == 1
    assert "no time" in gpu.attempt(gpu.Clock(1), 60, endless)["left_out"]
    gpu.LEAST, least = 0.1, gpu.LEAST
    try:
        assert "not done after" in gpu.attempt(gpu.Clock(60), 0.3, endless)["left_out"]
    finally:
        gpu.LEAST = least


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "add --tiny"),
        (["--tiny", "--gpu", "h10"], "did you mean h100-80gb?"),
        (["--tiny", "--json", "/no/such/folder/gpu.json"], "does not exist"),
        (["--tiny", "--micro-batch", "3"], "does not divide"),
        (["--tiny", "--seconds", "1"], "too short"),
    ],
)
def test_bad_input_is_one_sentence(argv: list[str], sentence: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu
    finally:
        sys.path.pop(0)
    import torch

    from efficientllm.errors import UsageError

    if not argv and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UsageError, match=sentence.replace("?", r"\?")):
        gpu.arguments_of(argv)
