"""What this process may use: processors by its affinity and the CPU quota of its container, and its control groups;
and which processes work for it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")

_workers_of_ranks: set[int] = set()
"""Workers on this machine that are no children of this process: other ranks of a torchrun job started them."""


def add_worker(process: int) -> None:
    """Counts a process of this machine as a worker of this one, until `remove_worker`."""
    _workers_of_ranks.add(process)


def remove_worker(process: int) -> None:
    _workers_of_ranks.discard(process)


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Makes this process get a signal when its parent ends, however that ends (Linux: prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # a C library without it: the parent's end is not noticed
            ctypes.CDLL(None).prctl(1, number)
    if os.getppid() != parent:
        os._exit(1)


def elsewhere(device: str, node: int) -> str:
    """The name, in results, of a device of another node of a torchrun job."""
    return f"{device}:node{node}"


def is_elsewhere(device: str) -> bool:
    """True for a name from `elsewhere`: nothing here can read that device's counters."""
    return ":node" in device


def workers() -> list[int]:
    """The ids of the processes on this machine that work for this one."""
    return [child.pid or 0 for child in multiprocessing.active_children()] + sorted(_workers_of_ranks)


def usable_processors() -> list[int]:
    """The numbers of the processors that the scheduler may give us; all of them where the system has no affinity."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Threads that can compute at the same time. More than the quota allows would all be stopped for a while together,
    so of a quota of 2.5 processors' time 2 are used."""
    return max(1, min(len(usable_processors()), int(cpu_quota() or os.cpu_count() or 1)))


def cpu_model() -> str:
    """The processor's name in /proc/cpuinfo, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^(?:model name|cpu model)\s*:\s*(\S.*)$", text, re.MULTILINE | re.IGNORECASE)
    return named[1].strip() if named else platform.machine()


def cpu_quota() -> float | None:
    """The processors' time that our control groups (Linux, version 1 or 2) allow in a second; None without a limit that
    is below the number of our processors."""
    limit = _tightest()
    return None if limit is None else limit[0]


def limiting_group() -> Path | None:
    """The folder of the control group that sets `cpu_quota`."""
    limit = _tightest()
    return None if limit is None else limit[1]


def _tightest() -> tuple[float, Path] | None:
    """The quota that is below the number of our processors, if any, and its group."""
    quota, group = min(_quotas(), default=(float("inf"), CGROUPS))
    return (quota, group) if quota < len(usable_processors()) else None


def _quotas() -> Iterator[tuple[float, Path]]:
    """The quotas of our groups and of all groups around them, with the groups' folders."""
    for folder in control_groups("cpu"):
        yield from ((quota, folder) for quota in _quota(folder))


def control_groups(controller: str) -> Iterator[Path]:
    """The folders of our control groups that may limit what `controller` names, `cpu` or `memory`, and of all groups
    around them; they need not exist."""
    for line in (_text(OWN_GROUPS) or "").splitlines():
        _, _, group = line.partition(":")
        controllers, _, path = group.partition(":")
        for name in _mounts(controllers, controller):
            inner = PurePosixPath(path.lstrip("/"))
            for folder in (inner, *inner.parents):  # a container may not see its own path, but sees its root
                yield CGROUPS / name / folder


def _mounts(controllers: str, wanted: str) -> tuple[str, ...]:
    """Where a hierarchy with these `controllers` may be mounted; none where `wanted` is not among them."""
    if not controllers:  # version 2
        return "", "unified"
    return (wanted, "cpu,cpuacct", "cpuacct,cpu") if wanted in controllers.split(",") else ()


def _quota(folder: Path) -> Iterator[float]:
    words = (_text(folder / "cpu.max") or "").split()
    if not words:
        words = [_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    if len(words) == 2 and all(word.strip().isdecimal() for word in words) and int(words[0]) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


@cache
def may_use_amx() -> bool:
    """Asks the system for the tiles of Intel's AMX, which a process needs leave for (Linux: arch_prctl(2),
    ARCH_REQ_XCOMP_PERM); false where there are none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        granted: int = ctypes.CDLL(None).syscall(158, 0x1023, 18)
    except (AttributeError, OSError):  # a C library without it
        return False
    return granted == 0
