"""Pins threads that compute together to different processors for a while.

On a busy machine the scheduler may put two of them on one processor, where one waits for the other for milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spdbench.measure.process_times import thread_cpu_ns
from spdbench.processors import usable_processors

TASKS = Path("/proc/self/task")
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@contextlib.contextmanager
def pinned(work: Callable[[], object], count: int) -> Iterator[None]:
    """Pins the `count` threads of this process that `work`, which is called once, keeps busiest.

    Their former affinity is restored at the end. Does nothing where threads cannot be pinned.
    """
    before: dict[int, set[int]] = {}
    try:
        with contextlib.suppress(OSError):
            processors = cores_first(usable_processors())
            for index, thread in enumerate(_busiest_threads(work, count) if hasattr(os, "sched_getaffinity") else ()):
                before[thread] = os.sched_getaffinity(thread)
                os.sched_setaffinity(thread, {processors[index % len(processors)]})
        yield
    finally:
        for thread, allowed in before.items():
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(thread, allowed)


def cores_first(processors: Sequence[int]) -> list[int]:
    """The same processors in another order: one of each core, then their siblings."""
    return sorted(processors, key=lambda one: (sum(other < one for other in _siblings(one) & set(processors)), one))


def _siblings(processor: int) -> set[int]:
    """All processors of the same core, `processor` included; only that where Linux does not list them."""
    try:
        text = Path(SIBLINGS.format(processor)).read_text(encoding="ascii")
    except OSError:
        return {processor}
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {one for first, last in ranges for one in range(int(first), int(last or first) + 1)}


def _busiest_threads(work: Callable[[], object], count: int) -> list[int]:
    before = {thread: thread_cpu_ns(thread) for thread in _threads()}
    work()
    spent = {thread: thread_cpu_ns(thread) - before.get(thread, 0) for thread in _threads()}
    return sorted(spent, key=lambda thread: spent[thread], reverse=True)[:count]


def _threads() -> list[int]:
    return [int(path.name) for path in TASKS.iterdir()]
