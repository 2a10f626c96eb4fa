"""Other programs' use of the GPUs that backends run on, as NVML (the library of NVIDIA's driver) samples it.

Asked once after each request, as the driver takes longer to answer than files of the kernel. NVML is never required:
without it, and where a GPU keeps no such samples (a part of one, a virtual one), nothing is known.

Source: NVIDIA, "NVML API Reference Guide", nvmlDeviceGetProcessUtilization.
"""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spdbench.measure.energy import nvml_device
from spdbench.measure.process_times import process_name
from spdbench.processors import workers

MAX_SAMPLES = 1024


class Sample(ctypes.Structure):
    """nvmlProcessUtilizationSample_t; utilisations in per cent."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("timestamp_us", ctypes.c_ulonglong),
        ("sm", ctypes.c_uint),
        ("memory", ctypes.c_uint),
        ("encoder", ctypes.c_uint),
        ("decoder", ctypes.c_uint),
    )


class GpuUsers:
    """The programs that use the GPUs with these `uuids`. `names` are those of the last call, the busiest first."""

    def __init__(self, uuids: Sequence[str] = (), proc: Path = Path("/proc"), library: Any = None) -> None:
        self.names: list[str] = []
        self._proc = proc
        self._devices = [device for uuid in uuids if (device := nvml_device(uuid, library)) is not None]
        self._last_us: dict[int, int] = defaultdict(int)
        self._knows_us = False
        try:
            self.others_share()  # samples so far are of the time before
        except AttributeError:  # a driver whose library lacks the function
            self._devices = []

    def others_share(self) -> float | None:
        """The share of the time since the last call in which others kept the busiest GPU at work; None if unknown.

        The driver numbers processes as its own namespace does, which a container may not share. So nothing is known
        until our own number has been among them.
        """
        self.names = []
        used: dict[int, float] = {}
        share = None
        for number, device in enumerate(self._devices):
            found = self._samples(number, *device)
            for pid, sm in found.items():
                used[pid] = max(sm, used.get(pid, 0.0))
            share = max(share or 0.0, min(1.0, sum(found.values())))
        if not self._knows_us:
            return None
        self.names = [process_name(self._proc, pid) for pid in sorted(used, key=lambda pid: -used[pid]) if used[pid]]
        return share

    def _samples(self, number: int, nvml: Any, handle: ctypes.c_void_p) -> dict[int, float]:
        """Each other process's mean use of one GPU in the samples that are new."""
        samples, count = (Sample * MAX_SAMPLES)(), ctypes.c_uint(MAX_SAMPLES)
        since = ctypes.c_ulonglong(self._last_us[number])
        if nvml.nvmlDeviceGetProcessUtilization(handle, samples, ctypes.byref(count), since):
            return {}  # not found: no other program has used it since
        own = {os.getpid(), *workers()}
        by_process: dict[int, list[float]] = defaultdict(list)
        for sample in samples[: count.value]:
            self._last_us[number] = max(self._last_us[number], sample.timestamp_us)
            if sample.pid in own:
                self._knows_us = True
            else:
                by_process[sample.pid].append(sample.sm / 100)
        return {pid: sum(values) / len(values) for pid, values in by_process.items()}
