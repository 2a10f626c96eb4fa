"""Limits on the time and the memory that a chat template takes: it is code that a model's author wrote.

Templates run in a sandbox that keeps them from files and programs, but a few words of them can loop for ever or make a
text of gigabytes. A process for each rendering would cost more than the rendering.
"""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
_one_at_a_time = threading.RLock()
"""The limit on memory is the process's: of two threads each would give back what the other one has set."""


class TooSlowError(BaseException):
    """Not an `Exception`, so that nothing on the way catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TooSlowError` in this thread, inside the block, once it has run for `seconds`.

    A template's code cannot be interrupted from outside by other means, as signals reach the main thread only.
    """
    thread, lock, ended = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not ended:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TooSlowError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            ended = True
        timer.cancel()


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Inside, allocating more than `num_bytes` on top of what the process has raises `MemoryError`, in all of its
    threads. Other threads that ask for a limit wait. Without effect on systems other than Linux, which do not say how
    much that is.

    Only for code in Python: libraries in other languages end the process when they get no memory.
    """
    with _one_at_a_time:
        try:
            used = int(STATUS.read_bytes().partition(b"VmData:")[2].split()[0]) * 1024
        except (OSError, IndexError, ValueError):
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = [limit for limit in (used + num_bytes, soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(allowed), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
