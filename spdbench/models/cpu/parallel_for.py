"""A parallel loop over the chunks of one task at a time, without locks: compiled by numba.

The calling thread writes its task into a slot in shared memory; it and the pool's workers then claim chunks of it by
an atomic increment of the chunk counter. No chunk is assigned in advance: a worker that comes late, because its
processor is busy otherwise, costs no time, since the others do its chunks. Only a chunk that was begun has to be
finished, which is what the counter `DONE` shows.

The chunk counter holds three numbers in one word: the number of the task, how many chunks it has, and which is next. So
one atomic increment either claims a chunk of the task that is in the slot at this moment, whichever task the worker
had looked at before, or shows that none is left. Were they separate words, a worker that is suspended between reading
the task's number and claiming a chunk could claim one of the next task as if it were the last one's. And as long as a
claimed chunk is not done, the caller waits, so the task in the slot cannot change under a worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from spdbench.models.cpu.compile import I64, F, compiled, inner, llvm_function, pointer_to, record_at
from spdbench.models.cpu.kernels import attend_heads
from spdbench.models.cpu.packed_gemm import FEATURES, multiply_blocks, num_blocks
from spdbench.models.cpu.worker_pool import CALLER, AttentionTask, GemmTask, TaskKind

CHUNKS_PER_THREAD = 4
"""More chunks than threads, so that a thread that is slowed down leaves the rest of its share to the others."""
CHUNK_COUNTER, DONE, MAX_WORKERS, CHUNK_SIZE, TASK = 0, 8, 16, 17, 24
"""Where the parts of the task slot are, in units of 8 bytes; what several threads write has a cache line of its own."""
SLOT_WORDS = TASK + max(len(GemmTask._fields), len(AttentionTask._fields))
NUMBER_SHIFT, COUNT_SHIFT, FIELD = 40, 20, 0xFFFFF
"""The chunk counter: the task's number, 22 bits, then the number of chunks and the next chunk, 20 bits each."""

GEMM = np.dtype([(name, np.int64) for name in GemmTask._fields])
ATTENTION = np.dtype([(name, np.int64) for name in AttentionTask._fields])
GEMM_BF16, GEMM_F32 = int(TaskKind.GEMM_BF16), int(TaskKind.GEMM_F32)
ATTENTION_BF16 = int(TaskKind.ATTENTION_BF16)


@intrinsic  # type: ignore[untyped-decorator]
def _fetch_add(_typing: Any, address: Any, amount: Any) -> Any:  # noqa: ARG001
    """Adds to the word at `address` in one atomic step; returns what it was before."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], I64.as_pointer()), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _load(_typing: Any, address: Any) -> Any:  # noqa: ARG001
    """The word at `address`, with all that its writer wrote before it."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], I64.as_pointer()), "acquire", 8, typ=I64)

    return types.int64(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _store(_typing: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """Writes the word at `address` for all threads to see, with all that was written before it."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], I64.as_pointer()), "release", 8)
        return ir.Constant(I64, 0)

    return types.int64(types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _pause(_typing: Any) -> Any:
    """Tells the processor that this loop waits (x86: PAUSE)."""

    def build(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if "sse2" in FEATURES:
            builder.call(llvm_function(builder, "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])), [])
        return ir.Constant(I64, 0)

    return types.int64(), build


@inner
def _attend(task: Any, begin: int, end: int, like: Any) -> None:
    """Attention of the heads `begin` to `end` of the task, of numbers of the type of `like`."""
    rows, size, width = task.num_rows, task.head_dim, task.num_heads * task.head_dim
    cache = (task.num_kv_heads, task.capacity, size)
    tree_rows = rows if task.tree_width > 0 else 0
    attend_heads(
        carray(pointer_to(task.queries, 0, like), (rows, width)),
        carray(pointer_to(task.keys, 0, like), cache),
        carray(pointer_to(task.values, 0, like), cache),
        task.slot,
        carray(pointer_to(task.depths, 0, np.int64(0)), rows),
        carray(pointer_to(task.visible, 0, np.uint8(0)), (tree_rows, task.tree_width)),
        task.window,
        carray(pointer_to(task.out, 0, like), (rows, width)),
        begin,
        end,
    )


@inner
def _num_units(task: int, kind: int) -> Any:
    """What the task at the address `task` can be cut into: blocks of a matrix multiplication; the heads of all rows of
    attention."""
    if kind <= GEMM_F32:
        return num_blocks(record_at(task, GEMM))
    attention = record_at(task, ATTENTION)
    return attention.num_rows * attention.num_heads


@inner
def _run_chunk(task: int, kind: int, chunk: int, chunk_size: int) -> None:
    begin = chunk * chunk_size
    end = min(begin + chunk_size, _num_units(task, kind))
    if kind == GEMM_BF16:
        multiply_blocks(record_at(task, GEMM), begin, end, np.uint16(0))
    elif kind == GEMM_F32:
        multiply_blocks(record_at(task, GEMM), begin, end, F(0))
    elif kind == ATTENTION_BF16:
        _attend(record_at(task, ATTENTION), begin, end, np.uint16(0))
    else:
        _attend(record_at(task, ATTENTION), begin, end, F(0))


@compiled
def parallel_for(task_slot: Any, task: Any, num_workers: int, index: int, spin_limit: int) -> None:
    """Runs `task` with up to `num_workers` workers, if `index` is `CALLER`; else, as worker number `index`, runs chunks
    of what is in the slot until it has found none `spin_limit` times in a row.

    Both roles are one function, so that the arithmetic exists once as machine code: the bits of a result do not depend
    on who computed which chunk. A caller without workers brings a slot of its own.
    """
    words: Any = np.int64(task_slot.ctypes.data)
    counter, done, max_workers = words + 8 * CHUNK_COUNTER, words + 8 * DONE, words + 8 * MAX_WORKERS
    num_chunks = 0
    if index == CALLER:
        for word in range(task.shape[0]):
            task_slot[TASK + word] = task[word]
        units = _num_units(words + 8 * TASK, task[0])
        wanted = CHUNKS_PER_THREAD * (num_workers + 1) if num_workers > 0 else 1
        task_slot[CHUNK_SIZE] = max(1, (units + wanted - 1) // wanted)
        num_chunks = (units + task_slot[CHUNK_SIZE] - 1) // task_slot[CHUNK_SIZE]
        _store(done, 0)
        _store(max_workers, num_workers)
        number = (_load(counter) >> NUMBER_SHIFT) + 1
        _store(counter, (number & 0x3FFFFF) << NUMBER_SHIFT | num_chunks << COUNT_SHIFT)
    spins = 0
    while spins < spin_limit:
        seen = _load(counter)  # looked at before it is incremented, which would take the cache line from the others
        if seen & FIELD < seen >> COUNT_SHIFT & FIELD and index < _load(max_workers):
            claimed = _fetch_add(counter, 1)
            if claimed & FIELD < claimed >> COUNT_SHIFT & FIELD:
                _run_chunk(words + 8 * TASK, task_slot[TASK], claimed & FIELD, task_slot[CHUNK_SIZE])
                _fetch_add(done, 1)
                spins = 0
        elif index == CALLER:
            break
        else:
            spins += 1
            _pause()
    if index == CALLER:
        while _load(done) < num_chunks:
            _pause()
