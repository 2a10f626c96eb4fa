"""Work on many files shared out over the cores, where it is worth starting processes for it.

Must not know what the work is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

WORTHWHILE_BYTES = 24 * 2**20
"""Files of less than this together are read before a second process would have started."""
MAX_PROCESSES = 8
FILES_AT_ONCE = 8

Made = TypeVar("Made")


def share_out(work: Callable[[Path], Made], files: Sequence[Path]) -> list[Made]:
    """`work` done on each of `files`, in their order, and once on a file that is named twice; raises what the first of
    them raises."""
    named: dict[Path, Path] = {}
    for file in files:
        named.setdefault(file.resolve(), file)
    files = list(named.values())
    processes = _num_processes(files)
    if processes < 2:
        return [work(file) for file in files]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, get_context("fork"), _leave_interrupts_to_the_parent) as pool:
        return list(pool.map(work, files, chunksize=FILES_AT_ONCE))


def _num_processes(files: Sequence[Path]) -> int:
    """1 where a second one would not pay, or a fork is not safe."""
    if sys.platform != "linux" or sum(map(_num_bytes, files)) < WORTHWHILE_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), len(files) // FILES_AT_ONCE, MAX_PROCESSES)


def _num_bytes(file: Path) -> int:
    """0 for a file that is not there: whoever reads it will say so."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
