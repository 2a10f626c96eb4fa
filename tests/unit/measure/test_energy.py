"""Energy counters: which are taken, how they wrap round, and that there is no energy where they cannot be read."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from spdbench.measure import energy
from spdbench.measure.energy import Counter, EnergyMeter, energy_meter, nvml_counter, rapl_counters

RANGE_UJ = 262_143_328_850


def zone(powercap: Path, place: str, name: str, energy_uj: int, range_uj: int | None = RANGE_UJ) -> Path:
    """One zone of a made-up powercap tree, which is flat, as the kernel shows it."""
    folder = powercap / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    if range_uj is not None:
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Two packages, memory and cores within them, the same packages through another door, and the whole platform."""
    (tmp_path / "intel-rapl").mkdir()
    for number in (0, 1):
        zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", 1_000_000 * (number + 1))
        zone(tmp_path, f"intel-rapl:{number}:0", "core", 400_000)
        zone(tmp_path, f"intel-rapl:{number}:1", "dram", 300_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    return tmp_path


def put(powercap: Path, place: str, energy_uj: int) -> None:
    (powercap / place / "energy_uj").write_text(f"{energy_uj}\n")


def test_packages_and_memory_count_once_each(server: Path) -> None:
    names = [counter.name for counter in rapl_counters(server)]
    assert names == ["RAPL package-0", "RAPL dram-0", "RAPL package-1", "RAPL dram-1"]


def test_energy_is_the_sum_of_what_the_counters_moved(server: Path) -> None:
    meter = energy_meter(["cpu"], server)
    before = meter.read()
    put(server, "intel-rapl:0", 3_500_000)
    put(server, "intel-rapl:1:1", 800_000)
    put(server, "intel-rapl:1:0", 99_000_000)
    put(server, "intel-rapl:2", 99_000_000)
    assert meter.joules(before, meter.read()) == pytest.approx(2.5 + 0.5)


def test_a_counter_that_begins_anew_has_gone_on_counting(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_500_000)
    meter = energy_meter(["cpu"], tmp_path)
    before = meter.read()
    put(tmp_path, "intel-rapl:0", 500_000)
    assert meter.joules(before, meter.read()) == pytest.approx(2.0)


def test_a_counter_that_fell_without_a_known_range_measures_nothing(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, range_uj=None)
    meter = energy_meter(["cpu"], tmp_path)
    before = meter.read()
    put(tmp_path, "intel-rapl:0", 1)
    assert meter.joules(before, meter.read()) is None


def test_a_machine_without_counters_has_no_energy(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        meter = energy_meter(["cpu"], folder)
        assert meter.counters == ()
        assert meter.joules(meter.read(), meter.read()) is None


@pytest.mark.parametrize("text", ["", "-5", "many", "1.5"])
def test_a_counter_that_is_no_number_is_none(tmp_path: Path, text: str) -> None:
    (zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj").write_text(text)
    assert rapl_counters(tmp_path) == ()


def test_counters_that_only_root_may_read_are_none(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.read_text

    def refusing(self: Path, *words: Any, **more: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return original(self, *words, **more)

    monkeypatch.setattr(Path, "read_text", refusing)
    assert rapl_counters(server) == ()


def test_a_counter_that_goes_away_during_a_run_leaves_no_energy(server: Path) -> None:
    meter = energy_meter(["cpu"], server)
    before = meter.read()
    put(server, "intel-rapl:0", 3_500_000)
    (server / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules(before, meter.read()) is None


def test_counters_that_stand_still_are_no_energy_of_zero(server: Path) -> None:
    """Virtual machines show such."""
    meter = energy_meter(["cpu"], server)
    assert meter.joules(meter.read(), meter.read()) is None


class FakeNvml:
    """Speaks like the driver's library: numbers for failures, results through pointers."""

    def __init__(self, millijoules: list[int], known: bytes = b"GPU-1") -> None:
        self.millijoules = millijoules
        self.known = known

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        if uuid != self.known:
            return 6
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, found: Any) -> int:  # noqa: N802
        assert handle.value == 7
        if not self.millijoules:
            return 3
        found._obj.value = self.millijoules.pop(0)
        return 0


def test_a_gpu_counts_millijoules() -> None:
    counter = nvml_counter("GPU-1", "NVML cuda:0", FakeNvml([1, 5_000, 8_500]))
    assert counter is not None
    meter = EnergyMeter((counter,))
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(3.5)


@pytest.mark.parametrize("library", [FakeNvml([]), FakeNvml([1], known=b"GPU-2"), object()])
def test_a_gpu_that_counts_no_energy_has_no_counter(library: object) -> None:
    assert nvml_counter("GPU-1", "NVML cuda:0", library) is None


def test_no_driver_is_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "NVML", "lib-that-is-not-there.so.1")
    assert nvml_counter("GPU-1", "NVML cuda:0") is None


def test_one_gpu_without_a_counter_leaves_no_energy_at_all(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's share alone would flatter what runs on the GPU."""
    found = {"cuda:0": Counter("NVML cuda:0", lambda: 0), "cuda:1": None}
    monkeypatch.setattr(energy, "_gpu_counter", found.get)
    names = [counter.name for counter in energy_meter(["cuda:0", "cuda:0"], server).counters]
    assert names[-1] == "NVML cuda:0"
    assert len(names) == 5
    assert energy_meter(["cuda:0", "cuda:1"], server).counters == ()
