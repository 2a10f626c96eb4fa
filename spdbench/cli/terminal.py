"""What commands ask of the process: Ctrl-C and SIGTERM as one kind of interruption, and a quick start and end."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GC_THRESHOLD = 200_000
"""New containers after which the garbage collector runs; imports leave some 80,000."""


def start_quickly() -> None:
    """For commands that only read results, before numpy is imported.

    Numpy starts no threads of its own, which gain nothing on results and take a core each. The garbage collector looks
    through what imports leave only when a lot more has come, and not at exit: of the 0.31 s of processor time of a
    `compare` of six small files it took 0.07 s, and there is next to nothing that it could free.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(GC_THRESHOLD)
    atexit.register(gc.freeze)  # the interpreter's last collection skips what is frozen


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`. Does nothing outside the main thread, where signals cannot be handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_from_now_on() -> None:
    """Ignores further signals, so that a second Ctrl-C does not interrupt the writing of what was finished."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def handlers_restored() -> Iterator[None]:
    """For callers that go on afterwards: Ctrl-C and SIGTERM are handled as before, whatever was set inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
