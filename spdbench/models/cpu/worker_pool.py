"""The threads that share the tasks of a CPU's kernels: as many as torch is set to use, the calling one included.

A worker waits for the next task in compiled code, without the interpreter's lock, for about a millisecond, and sleeps
on a semaphore after that. So it is there at once when the next task of a forward pass comes, a few microseconds later,
and an idle pool uses no processor. What is computed is in `parallel_for`, which needs numba; this module does not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spdbench.models.cpu.native import NativeFunctions, native_functions

SPIN_LIMIT = 50_000
"""How often a worker looks for a task before it goes to sleep: about a millisecond."""
CALLER = -1
"""The index of the calling thread; workers count from 0."""
AMX_STEPS = 16
"""Steps of a packed weight that a tile of Intel's AMX holds."""
LINE_WORDS = 8
"""A cache line in words of 8 bytes."""


class TaskKind(IntEnum):
    """What a task is. Its first word is twice this, plus 1 for numbers in float32 instead of bfloat16."""

    GEMM = 0
    ATTENTION = 1
    NORM = 2
    ROTARY = 3
    GATE = 4


class GemmTask(NamedTuple):
    """Rows times a packed weight, plus `bias` and `other` where these are not 0. Addresses first, then sizes. A weight
    with a `scale` is in 8 bits; else `scale` is 0. `uses_amx` is 1 for a weight that `amx` multiplies."""

    kind: int
    num_rows: int
    weight: int
    scale: int
    bias: int
    num_outputs: int
    num_steps: int
    row_bytes: int
    uses_amx: int
    rows: int
    out: int
    other: int


class AttentionTask(NamedTuple):
    """The attention of `attention.attend_heads`. `slot_at` is the address of the first new slot's number; `tree_width`
    is 0 for a chain, `window` is 0 where there is none."""

    kind: int
    num_rows: int
    queries: int
    keys: int
    values: int
    depths: int
    visible: int
    out: int
    slot_at: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    tree_width: int
    window: int


class NormTask(NamedTuple):
    """`kernels.norm_rows`, with a weight in float32; `eps_bits` are those of a float32."""

    kind: int
    num_rows: int
    rows: int
    weight: int
    eps_bits: int
    out: int
    width: int
    out_width: int


class RotaryTask(NamedTuple):
    """`kernels.rotate_rows`; `q_norm` and `k_norm` are in float32, and 0 where the model has none."""

    kind: int
    num_rows: int
    qkv: int
    q_norm: int
    k_norm: int
    eps_bits: int
    positions: int
    cos: int
    sin: int
    keys: int
    values: int
    slot_at: int
    queries: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    num_positions: int


class GateTask(NamedTuple):
    """`kernels.gate_rows`."""

    kind: int
    num_rows: int
    both: int
    out: int
    width: int


Task = GemmTask | AttentionTask | NormTask | RotaryTask | GateTask
TASK_WORDS = max(len(kind._fields) for kind in (GemmTask, AttentionTask, NormTask, RotaryTask, GateTask))
MAX_WORKERS = 255
CHUNK_COUNTER, DONE, NUM_WORKERS, CHUNK_SIZE, TASK = 0, 8, 16, 17, 24
"""Where the parts of the task slot are, in words of 8 bytes; what several threads write has a cache line of its own."""
STATUS = -(-(TASK + TASK_WORDS) // LINE_WORDS) * LINE_WORDS
"""Where what belongs to each worker is: its status, and its copy of the task, in cache lines of its own."""
OWN_WORDS = -(-(1 + TASK_WORDS) // LINE_WORDS) * LINE_WORDS
SLOT_WORDS = STATUS + OWN_WORDS * MAX_WORKERS


class Recording(NamedTuple):
    """Tasks to run later, and the tensors at their addresses."""

    tasks: list[Task]
    tensors: list[Tensor]


class WorkerPool:
    """This process's workers, started when they are first needed."""

    def __init__(self, functions: NativeFunctions) -> None:
        self._parallel_for = functions.parallel_for
        self.reset()

    def reset(self) -> None:
        """Starts over without workers: also what a forked child has to do, which has none of its parent's threads."""
        self._task_slot = _aligned_words(SLOT_WORDS)
        self._num_workers = self._num_asleep = 0
        self._sleepers = threading.Semaphore(0)
        self._lock, self._in_use = threading.Lock(), threading.Lock()
        self._recording = threading.local()

    def run(self, task: Task, *tensors: Tensor) -> None:
        """Runs the task, or adds it to what this thread records, with the `tensors` that it reads and writes."""
        recording: Recording | None = getattr(self._recording, "current", None)
        if recording is None:
            self.run_all(task_words([task]))
        else:
            recording.tasks.append(task)
            recording.tensors.extend(tensors)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Inside, this thread's tasks are not run but recorded."""
        self._recording.current = found = Recording([], [])
        try:
            yield found
        finally:
            self._recording.current = None

    def run_all(self, tasks: Any) -> None:
        """Runs the tasks of `task_words` one after the other with torch's number of threads; alone while another thread
        has the workers."""
        workers = min(torch.get_num_threads() - 1, MAX_WORKERS)
        at, count = tasks.ctypes.data, len(tasks)
        if workers <= 0 or not self._in_use.acquire(blocking=False):
            slot = _aligned_words(STATUS)
            self._parallel_for(slot.ctypes.data, at, count, 0, CALLER, SPIN_LIMIT)
            return
        try:
            if workers > self._num_workers:
                self._start_workers(workers)
            self._parallel_for(self._task_slot.ctypes.data, at, count, workers, CALLER, SPIN_LIMIT)
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
        slot = self._task_slot
        while True:
            self._parallel_for(slot.ctypes.data, 0, 0, 0, index, SPIN_LIMIT)
            with self._lock:
                self._num_asleep += 1
            self._sleepers.acquire()

    def _wake_workers(self) -> None:
        with self._lock:
            count, self._num_asleep = self._num_asleep, 0
        self._sleepers.release(count)


def kind_word(kind: TaskKind, dtype: torch.dtype) -> int:
    """The first word of a task of that kind about numbers of `dtype`: bfloat16 or float32."""
    return 2 * kind + (dtype == torch.float32)


def task_words(tasks: Sequence[Task]) -> Any:
    """The tasks as `parallel_for` reads them: one a row."""
    words = np.zeros((len(tasks), TASK_WORDS), np.int64)
    for row, task in enumerate(tasks):
        words[row, : len(task)] = task
    return words


def _aligned_words(count: int) -> Any:
    """Zeros that begin with a cache line, so that each part of the task slot has lines of its own."""
    words = np.zeros(count + LINE_WORDS, np.int64)
    first = -(words.ctypes.data // 8) % LINE_WORDS
    return words[first : first + count]


@cache
def worker_pool() -> WorkerPool | None:
    """The one pool of this process; None where its compiled code cannot be had."""
    functions = native_functions()
    if functions is None:
        return None
    pool = WorkerPool(functions)
    os.register_at_fork(after_in_child=pool.reset)
    return pool
