"""The demo from end to end at toy size, and again: finished stages are not repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficientllm.demo.story import DemoSize, run_demo
from efficientllm.reporting.plots import plot_run

TOY = DemoSize(
    vocabulary=512,
    hidden=32,
    layers=2,
    heads=2,
    intermediate=128,
    sequence_length=64,
    batch_tokens=512,
    source_tokens=8_192,
    prune_tokens=8_192,
    validation_tokens=4_096,
)


@pytest.mark.slow
def test_demo_tells_its_story_once(
    tmp_path: Path, small_corpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("efficientllm.jobs.finish.plot_run", plot_run)  # which the tiny world leaves out
    said: list[str] = []
    first = run_demo(tmp_path, said.append, TOY)
    table = capsys.readouterr().out
    assert list(first) == ["source", "compact", "from scratch"]
    assert all(name in table for name in first)
    rows = [line.split("│") for line in table.splitlines() if line.startswith("│")]
    pruned, forward = ([row[column].strip() for row in rows if row[1].strip()] for column in (5, 6))
    assert [cell == "-" for cell in pruned] == [True, False, True]
    assert all(float(cell.replace(",", "")) > 0 for cell in forward)
    assert first["compact"]["result"]["parameters"] <= round(0.4 * first["source"]["result"]["parameters"])
    assert first["from scratch"]["result"]["widths"] == first["compact"]["result"]["widths"]
    assert first["from scratch"]["tokens"] == first["compact"]["tokens"]
    assert (tmp_path / "compact" / "run.png").stat().st_size > 10_000
    assert said[-1].startswith(f"picture: {tmp_path / 'compact' / 'run.png'} ")
    said.clear()
    assert run_demo(tmp_path, said.append, TOY) == first
    assert sum("is finished" in line for line in said) == 3
