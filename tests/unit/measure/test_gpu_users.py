"""Other programs on a GPU, by a made-up library of the driver."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from spdbench.measure.gpu_users import GpuUsers


class Driver:
    """Answers as NVML does: `samples` are (process, time in us, use of the multiprocessors in per cent)."""

    def __init__(self, samples: list[tuple[int, int, int]], *, known: bool = True) -> None:
        self.samples = samples
        self._known = known

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 7
        return 0 if self._known and uuid == b"GPU-1" else 6

    def nvmlDeviceGetProcessUtilization(self, handle: Any, samples: Any, count: Any, since: Any) -> int:  # noqa: N802
        assert handle.value == 7
        new = [sample for sample in self.samples if sample[1] > since.value]
        for place, (process, timestamp, use) in zip(samples, new, strict=False):
            place.pid, place.timestamp_us, place.sm = process, timestamp, use
        count._obj.value = len(new)
        return 0 if new else 6


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "41").mkdir()
    (tmp_path / "41" / "comm").write_text("trainer\x1b[31m\n")
    return tmp_path


def test_others_use_is_the_mean_of_the_new_samples_and_they_are_named(proc: Path) -> None:
    driver = Driver([(os.getpid(), 1, 90), (41, 1, 100)])
    users = GpuUsers(["GPU-1"], proc, driver)
    driver.samples += [(os.getpid(), 5, 60), (41, 5, 20), (41, 6, 40)]
    assert users.others_share() == pytest.approx(0.3)
    assert users.names == ["trainer\\x1b[31m"]
    assert users.others_share() == 0
    assert users.names == []


def test_where_our_own_process_has_another_number_nothing_is_known(proc: Path) -> None:
    """As in a container: our own work would be another's."""
    driver = Driver([(41, 1, 100)])
    assert GpuUsers(["GPU-1"], proc, driver).others_share() is None


@pytest.mark.parametrize("uuids", [[], ["GPU-2"]])
def test_without_a_gpu_nothing_is_known(proc: Path, uuids: list[str]) -> None:
    assert GpuUsers(uuids, proc, Driver([])).others_share() is None


def test_a_driver_without_the_function_is_no_error(proc: Path) -> None:
    class Old:
        def nvmlInit_v2(self) -> int:  # noqa: N802
            return 0

        def nvmlDeviceGetHandleByUUID(self, *_: Any) -> int:  # noqa: N802
            return 0

    assert GpuUsers(["GPU-1"], proc, Old()).others_share() is None


def test_no_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert GpuUsers(["GPU-1"]).others_share() is None
