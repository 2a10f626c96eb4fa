"""A worker that loses its processor in the middle of a chunk: the caller does the chunk, the worker stores nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from spdbench.models.cpu.linear import PackedLinear, linear
from spdbench.models.cpu.native import native_functions
from spdbench.models.cpu.worker_pool import (
    CALLER,
    CHUNK_COUNTER,
    OWN_WORDS,
    SLOT_WORDS,
    STATUS,
    GemmTask,
    TaskKind,
    kind_word,
    task_words,
)
from tests.tiny import tensor

if native_functions() is None:
    pytest.skip("there are no compiled kernels here", allow_module_level=True)

from numba import njit

from spdbench.models.cpu.claims import IDLE, TAKEN, WRITING, begin_writing, fetch_add, load, replace
from spdbench.models.cpu.claims import store as store_word
from spdbench.models.cpu.parallel_for import COUNT_SHIFT, FIELD

PATIENCE_S = 20.0


@njit("int64(int64)", nogil=True)  # type: ignore[untyped-decorator]
def claim(words: int) -> int:
    """A claim on a chunk of the next task that comes; 0 if none came for a long time."""
    counter = words + 8 * CHUNK_COUNTER
    for _ in range(1_000_000_000):
        if load(counter) & FIELD < load(counter) >> COUNT_SHIFT & FIELD:
            claimed = fetch_add(counter, 1)
            if claimed & FIELD < claimed >> COUNT_SHIFT & FIELD:
                return int(claimed)
    return 0


@njit("void(int64, int64)")  # type: ignore[untyped-decorator]
def store(address: int, value: int) -> None:
    store_word(address, value)


@njit("boolean(int64, int64)")  # type: ignore[untyped-decorator]
def may_write(status: int, token: int) -> bool:
    return bool(begin_writing(status, token))


@njit("boolean(int64, int64, int64)")  # type: ignore[untyped-decorator]
def swap(address: int, old: int, new: int) -> bool:
    return bool(replace(address, old, new))


class Caller:
    """A multiplication that waits for one worker, which is the test."""

    def __init__(self) -> None:
        self.memory = np.zeros(SLOT_WORDS + 8, np.int64)
        self.words = self.memory.ctypes.data + -self.memory.ctypes.data % 64
        self.status = self.words + 8 * (STATUS + OWN_WORDS * 0)
        weight, self.rows = linear(tensor(3200, 64)), tensor(3, 64, seed=1)
        assert isinstance(weight, PackedLinear)
        self.expected = weight(self.rows)
        self.out = torch.full_like(self.expected, float("nan"))
        sizes = (weight.packed.data_ptr(), 0, 0, 3200, 64, 256, 0)
        task = GemmTask(
            kind_word(TaskKind.GEMM, torch.float32), 3, *sizes, self.rows.data_ptr(), self.out.data_ptr(), 0
        )
        self.weight, self.tasks = weight, task_words([task] * 5000)
        functions = native_functions()
        assert functions is not None
        call: Callable[..., None] = functions.parallel_for
        arguments = (self.words, self.tasks.ctypes.data, len(self.tasks), 1, CALLER, 1000)
        self.thread = threading.Thread(target=call, args=arguments)

    def has_status(self, wanted: int) -> bool:
        return int(self.memory[(self.status - self.memory.ctypes.data) // 8]) == wanted


@contextmanager
def waiting() -> Iterator[Any]:
    """A caller at work; at the end it has to finish with the right result."""
    caller = Caller()
    caller.thread.start()
    yield caller
    caller.thread.join(PATIENCE_S)
    assert not caller.thread.is_alive()
    assert torch.equal(caller.out, caller.expected)


def becomes(caller: Caller, wanted: int) -> bool:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if caller.has_status(wanted):
            return True
        time.sleep(0.001)
    return False


def test_a_chunk_is_taken_from_a_worker_that_does_not_go_on() -> None:
    with waiting() as caller:
        token = claim(caller.words)
        assert token
        store(caller.status, token)
        assert becomes(caller, TAKEN)
        assert not may_write(caller.status, token)
        time.sleep(0.05)
        assert caller.thread.is_alive()  # as long as the worker may read what the caller would free
        store(caller.status, IDLE)


def test_no_chunk_is_taken_while_its_results_are_stored() -> None:
    with waiting() as caller:
        token = claim(caller.words)
        assert token
        store(caller.status, token)
        if may_write(caller.status, token):
            time.sleep(0.2)
            assert caller.has_status(token | WRITING)
            assert caller.thread.is_alive()
            store(caller.status, token)
        assert becomes(caller, TAKEN)
        assert not swap(caller.status, token, IDLE)
        store(caller.status, IDLE)
