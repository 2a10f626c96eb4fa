"""Processor time of all processes: our own, and which others used most since the last look."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from spdbench.console import printable
from spdbench.processors import workers

NS_PER_S = 10**9
MIN_SHARE = 0.1
"""Of the processor time that was lost; a process that used less is not named."""

NAME_LENGTH = 48
"""Leaves room for the number of the process in a result's `who`."""


def own_cpu_ns() -> int:
    """Processor time of this process, its workers and those of its children that have ended, in ns, up to now."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time_ns() + sum(map(cpu_ns, workers())) + round((ended.ru_utime + ended.ru_stime) * NS_PER_S)


def cpu_ns(process: int) -> int:
    """Processor time of a process, in ns; 0 if there is none."""
    return _clock_ns(process, 0b010) if process else 0


def thread_cpu_ns(thread: int) -> int:
    """Processor time of a thread of this process, in ns; 0 if it has ended."""
    return _clock_ns(thread, 0b110)


def _clock_ns(number: int, kind: int) -> int:
    """A clock of scheduled time. Its number is the one that clock_getcpuclockid(3) and pthread_getcpuclockid(3) compute
    on Linux: the inverted id of a process or thread, then three bits for the kind of clock."""
    try:
        return time.clock_gettime_ns((~number << 3) | kind)
    except OSError:
        return 0


class ProcessTimes:
    """The processes in `proc`, and their processor time at the last look."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._last = self._all()

    def busiest(self, lost_ns: float) -> list[str]:
        """The other processes that used most processor time since the last call, or since the beginning, such as
        `python (pid 123)`; those that can have taken a good part of the `lost_ns` of a request in between. Omitted is
        what this process started, and what started it (make, a shell, pytest): to end that would end the measuring."""
        before, self._last = self._last, self._all()
        own = {os.getpid(), *workers()}
        used = {pid: now - before.get(pid, 0) for pid, now in self._last.items() if pid not in own}
        enough = MIN_SHARE * max(lost_ns, sum(used.values()))
        busy = sorted((pid for pid, spent in used.items() if spent >= enough), key=lambda pid: -used[pid])
        ancestors = set(self._ancestors(os.getpid()))
        found = (pid for pid in busy if pid not in ancestors and own.isdisjoint(self._ancestors(pid)))
        return [f"{process_name(self._proc, pid)} (pid {pid})" for pid in found]

    def _ancestors(self, process: int) -> Iterator[int]:
        """The processes that started this one, the nearest first."""
        while process := _parent(self._proc, process):
            yield process

    def _all(self) -> dict[int, int]:
        try:
            processes = [int(name) for name in os.listdir(self._proc) if name.isdecimal()]
        except OSError:
            return {}
        return {process: cpu_ns(process) for process in processes}


def _parent(proc: Path, process: int) -> int:
    """The process that started another; 0 where there is none, or it is not visible."""
    try:
        stat = (proc / str(process) / "stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def process_name(proc: Path, process: int) -> str:
    """What the system calls it: up to 15 characters, which it may choose itself."""
    try:
        name = (proc / str(process) / "comm").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "a process that is not visible"
    return printable(name.strip(), one_line=True)[:NAME_LENGTH]
