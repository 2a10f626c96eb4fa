"""Threads that share a few rows' products and attention with whoever asks for them: as many as torch is told to use.

A helper waits for work in compiled code for about a millisecond, so that it is there when the next piece of work
comes, and sleeps after that: an idle crew uses no processor. Must not know what is computed.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

import numpy as np
import torch

PATIENCE = 50_000
"""How often a helper looks for work before it goes to sleep: about a millisecond."""


LEADER = -1


class WorkerPool:
    """This process's helpers, started when they are first needed, by way of the compiled functions `sharing`."""

    def __init__(self, sharing: Any) -> None:
        self._sharing = sharing
        self._board = np.zeros(0, np.int64)
        self._num_helpers = self._num_asleep = 0
        self._beds = threading.Semaphore(0)
        self._door, self._free = threading.Lock(), threading.Lock()
        self._forget()

    def lead(self, job: Any) -> None:
        """Does the work `job`, as `sharing` has it, with torch's number of threads; alone while another thread has the
        helpers."""
        helpers = torch.get_num_threads() - 1
        if helpers <= 0 or not self._free.acquire(blocking=False):
            self._sharing.work(np.zeros(self._sharing.BOARD_WORDS, np.int64), job, 0, LEADER, PATIENCE)
            return
        try:
            if helpers > self._num_helpers:
                self._hire(helpers)
            self._sharing.work(self._board, job, helpers, LEADER, PATIENCE)
            if self._num_asleep:
                self._wake()
        finally:
            self._free.release()

    def _hire(self, count: int) -> None:
        for index in range(self._num_helpers, count):
            name = f"spdbench-helper-{index}"
            threading.Thread(target=self._help, args=(index,), name=name, daemon=True).start()
        self._num_helpers = count

    def _help(self, index: int) -> None:
        while True:
            self._sharing.work(self._board, self._board, 0, index, PATIENCE)
            with self._door:
                self._num_asleep += 1
            self._beds.acquire()

    def _wake(self) -> None:
        with self._door:
            count, self._num_asleep = self._num_asleep, 0
        self._beds.release(count)

    def _forget(self) -> None:
        """Nobody was hired: also true of a forked child, which has none of its parent's threads."""
        words = np.zeros(self._sharing.BOARD_WORDS + 8, np.int64)
        first = -(words.ctypes.data // 8) % 8  # so that each part of the board has a cache line of its own
        self._board = words[first : first + self._sharing.BOARD_WORDS]
        self._num_helpers = self._num_asleep = 0
        self._beds = threading.Semaphore(0)
        self._door, self._free = threading.Lock(), threading.Lock()


@cache
def worker_pool() -> WorkerPool | None:
    """The one crew of this process; None where compiled code cannot be had, which work that is none has shown."""
    try:
        from spdbench.models.cpu import parallel_for

        parallel_for.work(np.zeros(parallel_for.BOARD_WORDS, np.int64), parallel_for.no_work(), 0, LEADER, 0)
    except Exception:  # numba missing, switched off, or at a loss with this processor: each fails in its own way
        return None
    hired = WorkerPool(parallel_for)
    os.register_at_fork(after_in_child=hired._forget)
    return hired
