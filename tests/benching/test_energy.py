"""RAPL as the kernel shows it: packages and memory are added, subsets are not, a counter may start again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from efficientllm.benching.energy import counter_for, rapl, rapl_zones
from efficientllm.benching.process import measure

CPU = torch.device("cpu")


def zone(root: Path, folder: str, name: str, energy: int) -> Path:
    path = root / folder
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text("1000000\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The folder, and the counters of a package and of its memory; cores and the whole board are counted in others."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    zone(tmp_path, "intel-rapl:1", "psys", 5)
    return tmp_path, package, memory


def test_zones_are_added_and_wrap(powercap: tuple[Path, Path, Path]) -> None:
    root, package, memory = powercap
    assert [path.name for path in rapl_zones(root)] == ["intel-rapl:0", "intel-rapl:0:1"]
    joules = rapl(rapl_zones(root))
    assert joules() == 0.0
    package.write_text("200000")
    memory.write_text("600")
    assert joules() == pytest.approx(0.3 + 0.0005)
    package.write_text("300000")
    assert joules() == pytest.approx(0.4 + 0.0005)


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    counter, about = counter_for(CPU, tmp_path)
    assert counter is None
    assert "no RAPL counter is under" in about
    (tmp_path / "intel-rapl:0").mkdir()  # as for a user who may not read it
    counter, about = counter_for(CPU, tmp_path)
    assert counter is None
    assert "may not be read" in about


def test_clock_and_counter_stand_around_each_phase() -> None:
    """Making ready and cleaning up count for nothing, even where a phase fails."""

    class Machine:
        now, used, ended = 0.0, 0.0, 0

        def run(self, batch: int) -> Iterator[None]:
            try:
                self.now += 100
                yield
                self.now, self.used = self.now + 2, self.used + 5
                yield
                self.now, self.used = self.now + 12, self.used + 28 / batch
                yield
                self.now += 100
            finally:
                self.ended += 1

    machine = Machine()
    seconds = {"prefill_seconds": 2.0, "decode_seconds": 12.0}
    counted = measure(machine, 1, lambda: machine.used, lambda: machine.now)
    assert counted == seconds | {"prefill_joules": 5.0, "decode_joules": 28.0}
    assert measure(machine, 1, None, lambda: machine.now) == seconds | {"prefill_joules": None, "decode_joules": None}
    with pytest.raises(ZeroDivisionError):
        measure(machine, 0)
    assert machine.ended == 3
