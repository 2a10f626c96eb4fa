"""Parallel loops over the chunks of tasks, one task after the other, without locks: compiled by numba.

The calling thread brings the tasks of a whole forward pass. It writes one task at a time into a slot in shared memory;
it and the pool's workers then claim chunks of it by an atomic increment of the chunk counter. No chunk is assigned in
advance: a worker that comes late, because its processor is busy otherwise, costs no time, since the others do its
chunks. A worker that loses its processor in the middle of a chunk costs no more than that chunk's time: `claims` says
how the caller takes it over.

The chunk counter holds three numbers in one word: the number of the task, how many chunks it has, and which is next. So
one atomic increment either claims a chunk of the task that is in the slot at this moment, whichever task the worker
had looked at before, or shows that none is left. Were they separate words, a worker that is suspended between reading
the task's number and claiming a chunk could claim one of the next task as if it were the last one's. As long as a
claimed chunk is neither done nor taken over, the caller waits, so the task in the slot cannot change under a worker.
Before a worker's claim can be taken, the worker has copied the task.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from spdbench.models.cpu.amx import AMX_ROWS, HAS_AMX
from spdbench.models.cpu.attention import attend_heads
from spdbench.models.cpu.claims import IDLE, TAKEN, begin_writing, end_writing, fetch_add, load, pause, replace, store
from spdbench.models.cpu.compile import F, float_from_bits, inner, pointer_to, record_at
from spdbench.models.cpu.kernels import gate_rows, norm_rows, rotate_rows
from spdbench.models.cpu.packed_gemm import BLOCK_STEP_BYTES, multiply_blocks, num_blocks
from spdbench.models.cpu.worker_pool import (
    CALLER,
    CHUNK_COUNTER,
    CHUNK_SIZE,
    DONE,
    NUM_WORKERS,
    OWN_WORDS,
    STATUS,
    TASK,
    TASK_WORDS,
    AttentionTask,
    GateTask,
    GemmTask,
    NormTask,
    RotaryTask,
    TaskKind,
)

CHUNKS_PER_THREAD = 4
"""More chunks than threads, so that a thread that is slowed down leaves the rest of its share to the others."""
PIECE_BYTES = 1 << 17
"""The most that a chunk reads, as long as a unit of the task is smaller: 5 to 10 microseconds of work."""
TAKE_AFTER = 1000
"""How often the caller looks whether others' chunks of `PIECE_BYTES` are done before it does them itself: several times
as long as they take."""

NUMBER_SHIFT, COUNT_SHIFT, FIELD = 40, 20, 0xFFFFF
"""The chunk counter: the task's number, 22 bits, then the number of chunks and the next chunk, 20 bits each."""
LAST_NUMBER = 0x3FFFFF


def _record(task: Any) -> Any:
    """The type of a task's words, read by name."""
    return np.dtype([(name, np.int64) for name in task._fields])


GEMM, ATTENTION, NORM, ROTARY, GATE = map(_record, (GemmTask, AttentionTask, NormTask, RotaryTask, GateTask))
GEMM_KIND, ATTENTION_KIND, NORM_KIND, ROTARY_KIND = (
    int(kind) for kind in (TaskKind.GEMM, TaskKind.ATTENTION, TaskKind.NORM, TaskKind.ROTARY)
)


@inner
def _attend(task: Any, begin: int, end: int, like: Any, status: int, token: int) -> None:
    """Attention of the heads `begin` to `end` of all rows, counted row after row."""
    rows, size, width = task.num_rows, task.head_dim, task.num_heads * task.head_dim
    cache = (task.num_kv_heads, task.capacity, size)
    tree_rows = rows if task.tree_width > 0 else 0
    attend_heads(
        carray(pointer_to(task.queries, 0, like), (rows, width)),
        carray(pointer_to(task.keys, 0, like), cache),
        carray(pointer_to(task.values, 0, like), cache),
        load(task.slot_at),
        carray(pointer_to(task.depths, 0, np.int64(0)), rows),
        carray(pointer_to(task.visible, 0, np.uint8(0)), (tree_rows, task.tree_width)),
        task.window,
        carray(pointer_to(task.out, 0, like), (rows, width)),
        begin,
        end,
        status,
        token,
    )


@inner
def _rotate(task: Any, begin: int, end: int, like: Any) -> None:
    rows, size = task.num_rows, task.head_dim
    cache = (task.num_kv_heads, task.capacity, size)
    angles = (task.num_positions, size)
    rotate_rows(
        carray(pointer_to(task.qkv, 0, like), (rows, (task.num_heads + 2 * task.num_kv_heads) * size)),
        carray(pointer_to(task.q_norm, 0, F(0)), size if task.q_norm != 0 else 0),
        carray(pointer_to(task.k_norm, 0, F(0)), size if task.k_norm != 0 else 0),
        float_from_bits(np.int32(task.eps_bits)),
        carray(pointer_to(task.positions, 0, np.int64(0)), rows),
        carray(pointer_to(task.cos, 0, like), angles),
        carray(pointer_to(task.sin, 0, like), angles),
        carray(pointer_to(task.keys, 0, like), cache),
        carray(pointer_to(task.values, 0, like), cache),
        load(task.slot_at),
        carray(pointer_to(task.queries, 0, like), (rows, task.num_heads * size)),
        begin,
        end,
    )


@inner
def _normalise(task: Any, begin: int, end: int, like: Any) -> None:
    norm_rows(
        carray(pointer_to(task.rows, 0, like), (task.num_rows, task.width)),
        carray(pointer_to(task.weight, 0, F(0)), task.width),
        float_from_bits(np.int32(task.eps_bits)),
        carray(pointer_to(task.out, 0, like), (task.num_rows, task.out_width)),
        begin,
        end,
    )


@inner
def _gate(task: Any, begin: int, end: int, like: Any) -> None:
    gate_rows(
        carray(pointer_to(task.both, 0, like), (task.num_rows, 2 * task.width)),
        carray(pointer_to(task.out, 0, like), (task.num_rows, task.width)),
        begin,
        end,
    )


@inner
def _num_units(task: int) -> Any:
    """What the task at the address `task` can be cut into: blocks of a matrix multiplication, the heads of all rows of
    attention, rows of anything else."""
    which = load(task) // 2
    if which == GEMM_KIND:
        return num_blocks(record_at(task, GEMM))
    if which == ATTENTION_KIND:
        attention = record_at(task, ATTENTION)
        return attention.num_rows * attention.num_heads
    return record_at(task, NORM).num_rows


@inner
def _run_units(task: int, kind: int, begin: int, end: int, like: Any, status: int, token: int) -> None:
    """The units `begin` to `end` of the task, of numbers of the type of `like`."""
    which = kind // 2
    if which == GEMM_KIND:
        multiply_blocks(record_at(task, GEMM), begin, end, like, status, token)
    elif which == ATTENTION_KIND:
        _attend(record_at(task, ATTENTION), begin, end, like, status, token)
    elif begin_writing(status, token):  # what is left is short, and is stored as it is computed
        if which == NORM_KIND:
            _normalise(record_at(task, NORM), begin, end, like)
        elif which == ROTARY_KIND:
            _rotate(record_at(task, ROTARY), begin, end, like)
        else:
            _gate(record_at(task, GATE), begin, end, like)
        end_writing(status, token)


@inner
def _run_chunk(task: int, chunk: int, chunk_size: int, status: int, token: int) -> None:
    kind = load(task)
    begin = chunk * chunk_size
    end = min(begin + chunk_size, _num_units(task))
    if kind % 2 == 0:
        _run_units(task, kind, begin, end, np.uint16(0), status, token)
    else:
        _run_units(task, kind, begin, end, F(0), status, token)


@inner
def _chunk_size(task: int, num_workers: int) -> Any:
    """How many units of the task one chunk has: a small piece of work, so that little is lost with a chunk that has to
    be done twice, and at least `CHUNKS_PER_THREAD` chunks a thread."""
    threads, units = num_workers + 1, _num_units(task)
    size = max(1, min(units // (CHUNKS_PER_THREAD * threads), PIECE_BYTES // max(1, _unit_bytes(task))))
    if load(task) // 2 == ATTENTION_KIND:
        attention = record_at(task, ATTENTION)
        group = attention.num_heads // attention.num_kv_heads  # heads that read the same values
        if size >= group or units >= group * threads:
            size = max(1, size // group) * group
    elif size > 1 and load(task) // 2 == GEMM_KIND:
        size = size // 2 * 2  # blocks that AMX sums together
    return size


@inner
def _unit_bytes(task: int) -> Any:
    """About how many bytes a unit of the task reads; more for many rows, which are bound by arithmetic."""
    which = load(task) // 2
    if which == GEMM_KIND:
        gemm = record_at(task, GEMM)
        rows_at_once = AMX_ROWS if HAS_AMX and gemm.uses_amx != 0 else 4
        return gemm.num_steps * BLOCK_STEP_BYTES * max(rows_at_once, gemm.num_rows) // rows_at_once
    if which == ATTENTION_KIND:
        attention = record_at(task, ATTENTION)
        return (load(attention.slot_at) + attention.num_rows) * attention.head_dim * 2
    return 0


@inner
def _copy(task: int, to: int) -> None:
    for word in range(TASK_WORDS):
        store(to + 8 * word, load(task + 8 * word))


@inner
def _take(words: int, number: int) -> Any:
    """The number of a chunk of task `number` that is taken from the worker that has begun it; -1 if there is none."""
    for worker in range(load(words + 8 * NUM_WORKERS)):
        status = words + 8 * (STATUS + OWN_WORDS * worker)
        token = load(status)
        if token > 0 and token >> NUMBER_SHIFT == number and replace(status, token, TAKEN):
            return token & FIELD
    return -1


def parallel_for(words: int, tasks: int, num_tasks: int, num_workers: int, index: int, spin_limit: int) -> None:
    """Runs the `num_tasks` tasks at the address `tasks`, one after the other with up to `num_workers` workers, if index
    is `CALLER`; else, as worker number `index`, runs chunks of the task in the slot at the address `words` until it has
    found none `spin_limit` times in a row.

    Both roles are one function with one place that computes, so that the arithmetic exists once as machine code: the
    bits of a result do not depend on who computed which chunk. A caller without workers brings a slot of its own.
    """
    counter, done, in_slot = words + 8 * CHUNK_COUNTER, words + 8 * DONE, words + 8 * TASK
    is_caller = index == CALLER
    own_status = words + 8 * (STATUS + OWN_WORDS * index)
    next_task, num_chunks, chunk_size, number, patience, spins = 0, 0, 0, 0, 0, 0
    while True:
        chunk, task, status, token = -1, in_slot, 0, 0
        if is_caller and load(done) >= num_chunks:
            if next_task == num_tasks:
                break
            _copy(tasks + 8 * TASK_WORDS * next_task, in_slot)
            next_task += 1
            chunk_size = _chunk_size(in_slot, num_workers) if num_workers > 0 else _num_units(in_slot)
            num_chunks = (_num_units(in_slot) + chunk_size - 1) // chunk_size
            store(done, 0)
            spins = 0
            if num_chunks == 1:
                chunk = 0  # not worth telling the workers
            else:
                patience = TAKE_AFTER * max(1, chunk_size * _unit_bytes(in_slot) // PIECE_BYTES)
                store(words + 8 * CHUNK_SIZE, chunk_size)
                store(words + 8 * NUM_WORKERS, num_workers)
                number = ((load(counter) >> NUMBER_SHIFT) + 1) & LAST_NUMBER
                store(counter, number << NUMBER_SHIFT | num_chunks << COUNT_SHIFT)
        if chunk < 0:
            seen = load(counter)  # looked at before it is incremented, which would take the cache line from the others
            if seen & FIELD < seen >> COUNT_SHIFT & FIELD and index < load(words + 8 * NUM_WORKERS):
                claimed = fetch_add(counter, 1)
                if claimed & FIELD < claimed >> COUNT_SHIFT & FIELD:
                    chunk = claimed & FIELD
                    if not is_caller:
                        status, task, token = own_status, own_status + 8, claimed
                        _copy(in_slot, task)
                        chunk_size = load(words + 8 * CHUNK_SIZE)
                        store(status, token)  # from here on the chunk can be taken
            else:
                spins += 1
                pause()
                if is_caller and spins >= patience:
                    chunk = _take(words, number)
                elif not is_caller and spins >= spin_limit:
                    break
        if chunk >= 0:
            _run_chunk(task, chunk, chunk_size, status, token)
            if status == 0 or replace(status, token, IDLE):
                fetch_add(done, 1)
            else:
                store(status, IDLE)  # the caller has taken the chunk
            spins = 0
    for worker in range(num_workers if is_caller else 0):
        # A worker whose chunk was taken may still read what the caller frees after this.
        while load(words + 8 * (STATUS + OWN_WORDS * worker)) == TAKEN:
            pause()
