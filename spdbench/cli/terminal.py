"""What commands ask of the process: Ctrl-C and SIGTERM as one kind of interruption, and no threads of numpy's own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def use_one_numpy_thread() -> None:
    """Keeps numpy, which is not imported yet, from starting threads: they gain nothing on results and take a core
    each."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


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
