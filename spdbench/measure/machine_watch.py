"""What else the machine does while a request is timed: read just before and just after it, outside of the clock.

A reading costs some 20 us: files of /proc and /sys stay open and are read with one system call each, and one that is
slow on this machine (/proc/stat of hundreds of processors) is omitted or replaced when the watch begins. The programs
that used the processors are looked up only after a request that was disturbed. Where the system does not show a number,
it is None.

Sources: proc(5); the kernel's documentation of cgroup v1 and v2 (cpu.stat), of pressure stall information, and of
cpufreq; `thermal_throttle` in arch/x86/kernel/cpu/mce/therm_throt.c.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from spdbench.judge.results.machine_load import BUSY_SHARE, MAX_NAMES, MachineLoad
from spdbench.measure.gpu_users import GpuUsers
from spdbench.measure.process_times import ProcessTimes, own_cpu_ns
from spdbench.processors import limiting_group, usable_processors

MAX_SOURCE_NS = 20_000
"""A source whose reading takes longer is omitted."""
TRIES = 5
MAX_BYTES = 65_536
NUM_CLOCKS = 4
NS_PER_S, NS_PER_MS, NS_PER_US = 10**9, 10**6, 10**3

Reading = Mapping[str, int]
Source = Callable[[], Reading]
"""Counters by name, in nanoseconds since an arbitrary moment where no other unit is named."""


class MachineWatch:
    """Readings of a machine and the difference between two of them. A watch of no processors shows nothing.

    `gpus` are the uuids of the GPUs that backends use.
    """

    def __init__(self, gpus: Sequence[str] = (), proc: Path = Path("/proc"), sys_: Path = Path("/sys")) -> None:
        self._processors = usable_processors()
        self._files: list[int] = []
        self._sources = [source for source in self._find(proc, sys_) if _cost_ns(source) <= MAX_SOURCE_NS]
        self._gpus = GpuUsers(gpus)
        self._processes = ProcessTimes(proc)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def read(self) -> Reading:
        """The counters now; those that cannot be read are missing."""
        found = {"wall": time.perf_counter_ns(), "own": own_cpu_ns()}
        for source in self._sources:
            with contextlib.suppress(OSError, ValueError, IndexError):
                found |= source()
        return found

    def load(self, before: Reading, after: Reading) -> MachineLoad:
        """What happened between two readings. Looks up the programs that used the time if it disturbs a request."""
        passed = {name: after[name] - before[name] for name in after.keys() & before.keys()}
        wall_ns = max(passed["wall"], 1)
        core_ns = wall_ns * len(self._processors)

        def share(name: str, whole_ns: int) -> float | None:
            return min(1.0, max(0.0, passed[name] / whole_ns)) if name in passed else None

        others = None
        if "idle" in passed:
            busy_ns = core_ns - passed["idle"] - passed.get("steal", 0)
            others = min(1.0, max(-1.0, (busy_ns - passed["own"]) / core_ns))
        found = MachineLoad(
            wall_s=wall_ns / NS_PER_S,
            cores=len(self._processors),
            others=others,
            steal=share("steal", core_ns),
            throttled=share("throttled", core_ns),
            hot=share("hot", wall_ns),
            memory=share("memory", wall_ns),
            gpu=self._gpus.others_share(),
            major_faults=max(0, passed["major_faults"]) if "major_faults" in passed else None,
            clock_mhz=after["clock_khz"] / 1000 if "clock_khz" in after else None,
        )
        names: list[str] = []
        if found.disturbed and (found.gpu or 0.0) > BUSY_SHARE:
            names += self._gpus.names
        if found.disturbed and (others or 0.0) > BUSY_SHARE:
            names += self._processes.busiest((others or 0.0) * core_ns)
        return found.model_copy(update={"who": names[:MAX_NAMES]})

    # Sources

    def _find(self, proc: Path, sys_: Path) -> Iterator[Source]:
        """Those that this machine has."""
        if (stat := self._open(proc / "stat")) is not None:
            every = len(self._processors) == os.cpu_count()
            wanted = (b"cpu",) if every else tuple(b"cpu%d" % number for number in self._processors)
            of_stat = _stat_reader(stat, frozenset(wanted))
            if _cost_ns(of_stat) <= MAX_SOURCE_NS:
                yield of_stat
            elif every and (uptime := self._open(proc / "uptime")) is not None:
                yield lambda: {"idle": round(float(_read(uptime).split()[1]) * NS_PER_S)}
        folder = limiting_group()
        if folder is not None and (group := self._open(folder / "cpu.stat")) is not None:
            yield _number_reader(group, "throttled", rb"^throttled_usec (\d+)", NS_PER_US)  # version 2
            yield _number_reader(group, "throttled", rb"^throttled_time (\d+)", 1)  # version 1
        if (pressure := self._open(proc / "pressure" / "memory")) is not None:
            yield _number_reader(pressure, "memory", rb"^some .*total=(\d+)", NS_PER_US)
        cpus = sys_ / "devices" / "system" / "cpu"
        first = cpus / f"cpu{self._processors[0]}"
        if (heat := self._open(first / "thermal_throttle" / "package_throttle_total_time_ms")) is not None:
            yield _number_reader(heat, "hot", rb"(\d+)", NS_PER_MS)
        files = [
            self._open(cpus / f"cpu{number}" / "cpufreq" / "scaling_cur_freq")
            for number in self._processors[:NUM_CLOCKS]
        ]
        if clocks := [file for file in files if file is not None]:
            yield lambda: {"clock_khz": max(int(_read(file)) for file in clocks)}
        yield lambda: {"major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt}

    def _open(self, path: Path) -> int | None:
        """A descriptor of a file that can be read; None otherwise."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.append(file)
            os.pread(file, 1, 0)
        except OSError:
            return None
        return file


def _read(file: int) -> bytes:
    return os.pread(file, MAX_BYTES, 0)


def _cost_ns(source: Source) -> float:
    """What a reading takes; infinity for a source that cannot be read."""
    times = []
    for _ in range(TRIES):
        start = time.perf_counter_ns()
        try:
            if not source():
                return float("inf")
        except (OSError, ValueError, IndexError):
            return float("inf")
        times.append(time.perf_counter_ns() - start)
    return median(times)


def _stat_reader(file: int, wanted: frozenset[bytes]) -> Source:
    """Idle time and steal of the processors with the names `wanted`. Waiting for a disk is idle, too."""
    tick_ns = NS_PER_S // os.sysconf("SC_CLK_TCK")

    def read() -> Reading:
        idle = steal = 0
        for line in _read(file).split(b"\n"):
            if not line.startswith(b"cpu"):
                break
            name, *fields = line.split()
            if name in wanted:
                idle += int(fields[3]) + int(fields[4])
                steal += int(fields[7])
        return {"idle": idle * tick_ns, "steal": steal * tick_ns}

    return read


def _number_reader(file: int, name: str, pattern: bytes, unit: int) -> Source:
    """One number of a file, times `unit`; nothing where the file does not have it."""
    compiled = re.compile(pattern, re.MULTILINE)

    def read() -> Reading:
        found = compiled.search(_read(file))
        return {name: int(found[1]) * unit} if found else {}

    return read
