"""Work that several threads share, without locks: a board with one piece of work, of which each takes parts.

A helper that comes late, because somebody else has its processor, is not waited for: the others take its parts. Only a
part that was begun has to be finished. Compiled by numba; must not know torch or layers.

The word of tickets holds the work's number, how many parts it has, and which is next: who adds one to it has that part,
or sees that none is left, whichever work he thought it was about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from spdbench.models.cpu.kernels import F, attend_heads, compiled, inner
from spdbench.models.cpu.packed_gemm import FEATURES, declared, multiply_blocks, num_blocks, numbers_at

SHARES = 4
"""Into how many parts work is cut, for each thread."""
TICKETS, DONE, ALLOWED, JOB = 0, 8, 16, 24
"""Where things stand on the board, in words of 8 bytes, each in a cache line of its own."""
BOARD_WORDS = 48
KIND, PER_SHARE, DETAILS = 0, 1, 2
"""A piece of work: what it is, how many units a part has, and what its kind needs to know."""
PRODUCT, ATTENTION_PAIRS, ATTENTION_FLOATS = range(3)
QUERIES, KEYS, VALUES, DEPTHS, VISIBLE, MIXED, SLOT, NUM_ROWS, NUM_HEADS, NUM_KV, SIZE, CAPACITY, WIDTH, WINDOW = range(
    14
)
"""Attention: addresses, then sizes. WIDTH is the tree's, 0 for a chain."""
X86 = "sse2" in FEATURES

_I64 = ir.IntType(64)


@intrinsic  # type: ignore[untyped-decorator]
def _take(_typing: Any, address: Any, amount: Any) -> Any:  # noqa: ARG001
    """Adds to the word at `address`, at once for all threads; what it was before."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _I64.as_pointer()), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _look(_typing: Any, address: Any) -> Any:  # noqa: ARG001
    """The word at `address`, as other threads left it."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "acquire", 8, typ=_I64)

    return types.int64(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _show(_typing: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """Writes the word at `address` for all threads to see, and what was written before it."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _I64.as_pointer()), "release", 8)
        return ir.Constant(_I64, 0)

    return types.int64(types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _breathe(_typing: Any) -> Any:
    """A moment's rest in a loop that waits."""

    def build(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if X86:
            builder.call(declared(builder, "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])), [])
        return ir.Constant(_I64, 0)

    return types.int64(), build


def no_work() -> Any:
    """Attention of no rows."""
    job = np.zeros(DETAILS + WINDOW + 1, np.int64)
    job[KIND] = ATTENTION_FLOATS
    return job


@inner
def _attend(job: Any, begin: int, end: int, like: Any) -> None:
    """Some heads of some rows' attention."""
    rows, size, width = job[NUM_ROWS], job[SIZE], job[NUM_HEADS] * job[SIZE]
    cache = (job[NUM_KV], job[CAPACITY], size)
    seeing = rows if job[WIDTH] > 0 else 0
    attend_heads(
        carray(numbers_at(job[QUERIES], like), (rows, width)),
        carray(numbers_at(job[KEYS], like), cache),
        carray(numbers_at(job[VALUES], like), cache),
        job[SLOT],
        carray(numbers_at(job[DEPTHS], np.int64(0)), rows),
        carray(numbers_at(job[VISIBLE], np.uint8(0)), (seeing, job[WIDTH])),
        job[WINDOW],
        carray(numbers_at(job[MIXED], like), (rows, width)),
        begin,
        end,
    )


@inner
def _do_part(job: Any, part: int, units: int) -> None:
    begin = part * job[PER_SHARE]
    end = min(begin + job[PER_SHARE], units)
    if job[KIND] == PRODUCT:
        multiply_blocks(job[DETAILS:], begin, end)
    elif job[KIND] == ATTENTION_PAIRS:
        _attend(job[DETAILS:], begin, end, np.uint16(0))
    else:
        _attend(job[DETAILS:], begin, end, F(0))


@inner
def _num_units(job: Any) -> Any:
    """Blocks of a product; heads of attention, in all rows."""
    if job[KIND] == PRODUCT:
        return num_blocks(job[DETAILS:])
    return job[DETAILS + NUM_ROWS] * job[DETAILS + NUM_HEADS]


@compiled
def work(board: Any, job: Any, helpers: int, index: int, patience: int) -> None:
    """Does the work `job` with up to so many helpers; or, as helper number `index`, takes parts of whatever is on the
    board until it has looked in vain `patience` times.

    One function for both, whose machine code holds the arithmetic once: bits do not depend on who did which part.
    Who leads has the `index` -1, and without helpers a board of his own.
    """
    here = np.int64(board.ctypes.data)
    on_board = board[JOB:]
    parts = 0
    if index < 0:
        units = _num_units(job)
        hidden_indices = SHARES * (helpers + 1) if helpers > 0 else 1
        job[PER_SHARE] = max(1, (units + hidden_indices - 1) // hidden_indices)
        parts = (units + job[PER_SHARE] - 1) // job[PER_SHARE]
        for word in range(job.shape[0]):
            on_board[word] = job[word]
        _show(here + 8 * DONE, 0)
        _show(here + 8 * ALLOWED, helpers)
        number = (_look(here + 8 * TICKETS) >> 40) + 1
        _show(here + 8 * TICKETS, (number & 0x3FFFFF) << 40 | parts << 20)
    looked = 0
    while looked < patience:
        tickets = _look(here + 8 * TICKETS)
        if tickets & 0xFFFFF < tickets >> 20 & 0xFFFFF and index < _look(here + 8 * ALLOWED):
            ticket = _take(here + 8 * TICKETS, 1)
            if ticket & 0xFFFFF < ticket >> 20 & 0xFFFFF:  # that work waits for this part, so it is still there
                _do_part(on_board, ticket & 0xFFFFF, _num_units(on_board))
                _take(here + 8 * DONE, 1)
                looked = 0
        elif index < 0:
            break
        else:
            looked += 1
            _breathe()
    if index < 0:
        while _look(here + 8 * DONE) < parts:
            _breathe()
