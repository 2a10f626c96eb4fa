"""The threads that share the tasks of a CPU's kernels: as many as torch is set to use, the calling one included.

A worker waits for the next task in compiled code, without the interpreter's lock, for about a millisecond, and sleeps
on a semaphore after that. So it is there at once when the next task of a forward pass comes, a few microseconds later,
and an idle pool uses no processor. What is computed is in `parallel_for`, which needs numba; this module does not.
"""

from __future__ import annotations

import os
import threading
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

SPIN_LIMIT = 50_000
"""How often a worker looks for a task before it goes to sleep: about a millisecond."""
CALLER = -1
"""The index of the calling thread; workers count from 0."""
LINE_WORDS = 8
"""A cache line in words of 8 bytes."""


class TaskKind(IntEnum):
    """What a task is, by the numbers that it is about: `PAIRS` of bfloat16, or float32."""

    GEMM_BF16 = 0
    GEMM_F32 = 1
    ATTENTION_BF16 = 2
    ATTENTION_F32 = 3


class GemmTask(NamedTuple):
    """Rows times a packed weight, plus `bias` and `other` where these are not 0. Addresses first, then sizes."""

    kind: int
    weight: int
    bias: int
    num_outputs: int
    num_steps: int
    row_bytes: int
    rows: int
    num_rows: int
    out: int
    other: int


class AttentionTask(NamedTuple):
    """The attention of `kernels.attend_heads`. Addresses first, then sizes; `tree_width` is 0 for a chain, `window` is
    0 where there is none."""

    kind: int
    queries: int
    keys: int
    values: int
    depths: int
    visible: int
    out: int
    slot: int
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    tree_width: int
    window: int


class WorkerPool:
    """This process's workers, started when they are first needed. `loops` is the module `parallel_for`."""

    def __init__(self, loops: Any) -> None:
        self._loops = loops
        self.reset()

    def reset(self) -> None:
        """Starts over without workers: also what a forked child has to do, which has none of its parent's threads."""
        self._task_slot = _aligned_words(self._loops.SLOT_WORDS)
        self._num_workers = self._num_asleep = 0
        self._sleepers = threading.Semaphore(0)
        self._lock, self._in_use = threading.Lock(), threading.Lock()

    def run(self, task: GemmTask | AttentionTask) -> None:
        """Runs the task with torch's number of threads; alone while another thread has the workers."""
        words = np.fromiter(task, np.int64, len(task))
        workers = torch.get_num_threads() - 1
        if workers <= 0 or not self._in_use.acquire(blocking=False):
            self._loops.parallel_for(np.zeros(self._loops.SLOT_WORDS, np.int64), words, 0, CALLER, SPIN_LIMIT)
            return
        try:
            if workers > self._num_workers:
                self._start_workers(workers)
            self._loops.parallel_for(self._task_slot, words, workers, CALLER, SPIN_LIMIT)
            if self._num_asleep:
                self._wake_workers()
        finally:
            self._in_use.release()

    def _start_workers(self, count: int) -> None:
        for index in range(self._num_workers, count):
            name = f"spdbench-worker-{index}"
            threading.Thread(target=self._serve, args=(index,), name=name, daemon=True).start()
        self._num_workers = count

    def _serve(self, index: int) -> None:
        while True:
            self._loops.parallel_for(self._task_slot, self._task_slot, 0, index, SPIN_LIMIT)
            with self._lock:
                self._num_asleep += 1
            self._sleepers.acquire()

    def _wake_workers(self) -> None:
        with self._lock:
            count, self._num_asleep = self._num_asleep, 0
        self._sleepers.release(count)


def _aligned_words(count: int) -> Any:
    """Zeros that begin with a cache line, so that each part of the task slot has lines of its own."""
    words = np.zeros(count + LINE_WORDS, np.int64)
    first = -(words.ctypes.data // 8) % LINE_WORDS
    return words[first : first + count]


@cache
def worker_pool() -> WorkerPool | None:
    """The one pool of this process; None where numba's code cannot be had, which an empty task shows."""
    try:
        from spdbench.models.cpu import parallel_for

        nothing = np.array(AttentionTask(TaskKind.ATTENTION_F32, *[0] * 14), np.int64)
        parallel_for.parallel_for(np.zeros(parallel_for.SLOT_WORDS, np.int64), nothing, 0, CALLER, 0)
    except Exception:  # numba is missing, switched off, or does not know this processor: each fails in its own way
        return None
    pool = WorkerPool(parallel_for)
    os.register_at_fork(after_in_child=pool.reset)
    return pool
