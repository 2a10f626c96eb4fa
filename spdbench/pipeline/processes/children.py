"""Processes that work for this one: stages, and what answers messages while their time is measured.

A process that is started anew imports torch for some two seconds of processor time. On Linux the first one starts
`multiprocessing`'s fork server, which imports it once; each process is then a copy of that server. The server computes
nothing and has one thread, as a process has to that is copied. It ends with this process, and its copies with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing  # teaches `multiprocessing` to send tensors  # noqa: F401

IMPORTED_ONCE = ("spdbench.pipeline.processes.worker", "spdbench.models.target")


def child_process(work: Callable[..., None], *arguments: Any, name: str) -> BaseProcess:
    """A process, not started yet, that calls `work` and ends when this one does."""
    return _context().Process(target=_run, args=(name, dict(os.environ), work, arguments), name=name, daemon=True)


@cache
def _context() -> ForkServerContext | SpawnContext:
    if sys.platform != "linux":  # on macOS libraries of the system may not be copied
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    return context


def _run(name: str, environment: Mapping[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)  # as `top` shows it
    os.environ.clear()  # the server's is that of its start
    os.environ.update(environment)
    _end_with_parent()
    work(*arguments)


def _end_with_parent() -> None:
    """Ends this process when the one that asked for it ends, however that ends, even while this one is stopped.

    Linux sends a signal of our choice when the other end of a pipe closes (fcntl(2), O_ASYNC and F_SETSIG); elsewhere a
    stage notices by its closed pipes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        pipe = parent.sentinel
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # it ended before
        os._exit(1)
