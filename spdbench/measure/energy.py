"""Energy by the machine's own counters: processor packages and their memory (RAPL), and NVIDIA GPUs (NVML).

Counters belong to whole devices, so what idles or runs beside a backend on them counts as well. They are read before
and after a request, never within. Where they cannot be read there is no energy, not an energy of zero. Must not know
requests, results or files.

RAPL is read below /sys/class/powercap, as the kernel's documentation of power capping describes it; many systems let
only root do so. Its counters move every millisecond or so, a GPU's every 20 to 100 ms.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
ZONE = re.compile(r"intel-rapl:(\d+)(:\d+)?")
NVML = "libnvidia-ml.so.1"
UJ_PER_MJ, UJ_PER_J = 1_000, 1_000_000

Reading = tuple[int | None, ...]


class Counter(Protocol):
    """A device's energy since some moment. `wraps_at` is where it begins anew, in microjoules, if that is known."""

    @property
    def name(self) -> str: ...
    @property
    def wraps_at(self) -> int | None: ...
    def read(self) -> int | None:
        """Microjoules; None where it cannot be read."""


@dataclass(frozen=True)
class RaplZone:
    """One zone of the kernel's powercap tree."""

    name: str
    folder: Path
    wraps_at: int | None

    def read(self) -> int | None:
        return _number(self.folder / "energy_uj")


@dataclass(frozen=True)
class NvmlDevice:
    """One GPU, by the driver's own library."""

    name: str
    library: Any
    handle: Any
    wraps_at: int | None = None

    def read(self) -> int | None:
        millijoules = ctypes.c_ulonglong()
        if self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(millijoules)):
            return None
        return millijoules.value * UJ_PER_MJ


@dataclass(frozen=True)
class EnergyMeter:
    """The counters of what one backend runs on; without any, it measures nothing."""

    counters: tuple[Counter, ...] = ()

    def read(self) -> Reading:
        return tuple(counter.read() for counter in self.counters)

    def joules(self, before: Reading, after: Reading) -> float | None:
        """What was used between two readings; None where a counter could not be read, or none of them moved.

        A counter that stands lower than before has begun anew, once: a request outlasts no second round of it.
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
    """The meter for a backend on `devices`: all processor packages, whose programs drive every backend, and its GPUs.

    Empty if one of the GPUs has no counter, for the rest alone would flatter it.
    """
    names = [name for name in dict.fromkeys(devices) if name.startswith("cuda")]
    gpus = [_gpu_counter(name) for name in names]
    if None in gpus:
        return EnergyMeter()
    return EnergyMeter((*rapl_counters(powercap or POWERCAP), *(gpu for gpu in gpus if gpu is not None)))


def rapl_counters(powercap: Path) -> tuple[RaplZone, ...]:
    """The zones of packages, and of memory where it is counted apart; none if one of them cannot be read.

    Zones within a package (cores, graphics) and the one of the whole platform would count the same energy twice.
    """
    zones = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        place, name = ZONE.fullmatch(folder.name), _text(folder / "name") or ""
        if place is None or not (name == "dram" if place[2] else name.startswith("package")):
            continue
        label = f"{name}-{place[1]}" if place[2] else name
        zones.append(RaplZone(f"RAPL {label}", folder, _number(folder / "max_energy_range_uj")))
    return tuple(zones) if all(zone.read() is not None for zone in zones) else ()


def _gpu_counter(device: str) -> NvmlDevice | None:
    """The counter of one of torch's GPUs; None where the driver has none."""
    import torch

    index = torch.device(device).index or 0
    return nvml_counter(f"GPU-{torch.cuda.get_device_properties(index).uuid}", f"NVML cuda:{index}")


def nvml_counter(uuid: str, name: str, library: Any = None) -> NvmlDevice | None:
    """The counter of the GPU with this `uuid`; None without a driver, or where the GPU counts no energy."""
    try:
        nvml = library or ctypes.CDLL(NVML)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    try:
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return None
        found = NvmlDevice(name, nvml, handle)
        return None if found.read() is None else found
    except AttributeError:  # an old driver's library lacks the function
        return None


def _number(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) if text.isascii() and text.isdigit() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
