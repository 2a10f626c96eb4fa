"""Energy by the machine's own counters: processor packages and their memory (RAPL), and NVIDIA GPUs (NVML).

Counters belong to whole devices, so they include the idle power and other programs on them. They are read before and
after a request, never within. Where they cannot be read, energy is missing, not zero.

RAPL is read below /sys/class/powercap, as the kernel's documentation of power capping describes it; many systems let
only root do so. Its counters move about every millisecond, those of a GPU every 20 to 100 ms.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spdbench.processors import is_elsewhere

POWERCAP = Path("/sys/class/powercap")
ZONE = re.compile(r"intel-rapl:(\d+)(:\d+)?")
NVML = "libnvidia-ml.so.1"
UJ_PER_MJ, UJ_PER_J = 1_000, 1_000_000

Reading = tuple[int | None, ...]


@dataclass(frozen=True)
class Counter:
    """A device's energy since an arbitrary moment. `read` returns microjoules, or None where it cannot be read.

    At `wraps_at` microjoules the counter restarts from 0; None if unknown.
    """

    name: str
    read: Callable[[], int | None]
    wraps_at: int | None = None


@dataclass(frozen=True)
class EnergyMeter:
    """The counters of the devices that one backend runs on; an empty meter measures nothing."""

    counters: tuple[Counter, ...] = ()

    def read(self) -> Reading:
        return tuple(counter.read() for counter in self.counters)

    def joules(self, before: Reading, after: Reading) -> float | None:
        """Energy used between two readings; None if a counter could not be read, or none of them moved.

        A counter that is lower than before has wrapped around, once: no request is long enough for a second time.
        """
        total = 0
        for counter, start, end in zip(self.counters, before, after, strict=True):
            if start is None or end is None:
                return None
            if end < start:
                if counter.wraps_at is None:
                    return None
                end += counter.wraps_at
            total += end - start
        return total / UJ_PER_J if total > 0 else None


def energy_meter(devices: Sequence[str], powercap: Path | None = None) -> EnergyMeter:
    """The meter for a backend on `devices`: its GPUs, and all processor packages, since every backend uses the CPU.

    Empty if one of the GPUs has no counter, or is on another node: the rest alone would understate the energy.
    """
    if any(map(is_elsewhere, devices)):
        return EnergyMeter()
    names = [name for name in dict.fromkeys(devices) if name.startswith("cuda")]
    gpus = [_gpu_counter(name) for name in names]
    if None in gpus:
        return EnergyMeter()
    return EnergyMeter((*rapl_counters(powercap or POWERCAP), *(gpu for gpu in gpus if gpu is not None)))


def rapl_counters(powercap: Path) -> tuple[Counter, ...]:
    """The zones of packages, and of memory where it has its own; none if one of them cannot be read.

    Zones within a package (cores, graphics) and the zone of the whole platform would count the same energy twice.
    """
    zones = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        match, name = ZONE.fullmatch(folder.name), _text(folder / "name") or ""
        if match is None or not (name == "dram" if match[2] else name.startswith("package")):
            continue
        label = f"{name}-{match[1]}" if match[2] else name
        read = partial(_number, folder / "energy_uj")
        zones.append(Counter(f"RAPL {label}", read, _number(folder / "max_energy_range_uj")))
    return tuple(zones) if all(zone.read() is not None for zone in zones) else ()


def _gpu_counter(device: str) -> Counter | None:
    """The counter of the GPU that torch calls `device`; None if it has none."""
    return nvml_counter(gpu_uuid(device), f"NVML {device}")


def gpu_uuid(device: str) -> str:
    """The driver's name of the GPU that torch calls `device`."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(torch.device(device).index or 0).uuid}"


def nvml_counter(uuid: str, name: str, library: Any = None) -> Counter | None:
    """The counter of the GPU with this `uuid`; None without a driver, or if the GPU does not measure energy."""
    if (device := nvml_device(uuid, library)) is None:
        return None
    nvml, handle = device
    millijoules = ctypes.c_ulonglong()

    def read() -> int | None:
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return None if failed else millijoules.value * UJ_PER_MJ

    try:
        return None if read() is None else Counter(name, read)
    except AttributeError:  # an old driver's library lacks the function
        return None


def nvml_device(uuid: str, library: Any = None) -> tuple[Any, ctypes.c_void_p] | None:
    """The driver's library, and its handle of the GPU with this `uuid`; None without a driver, or if it has no such
    GPU."""
    handle = ctypes.c_void_p()
    try:
        nvml = library or ctypes.CDLL(NVML)
        failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
    except (OSError, AttributeError):  # no driver, or an old one whose library lacks a function
        return None
    return None if failed else (nvml, handle)


def _number(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) if text.isascii() and text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
