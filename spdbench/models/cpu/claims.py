"""Words in memory that several threads read and write, and how a worker's claim on a chunk can be taken from it.

A worker may lose its processor to another program in the middle of a chunk, for some milliseconds. The caller then
does that chunk itself. So that the worker, once it goes on, does not write into memory that is in use for something
else by then, each worker has a status word: the claim that it works on. It computes in memory of its own, and marks the
claim as being written for the moment in which it stores results. The caller takes a claim away by replacing the
status by `TAKEN` in one atomic step, which fails while results are being stored; the worker cannot mark a claim that
was taken, and drops what it computed.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from spdbench.models.cpu.compile import I64, inner, llvm_function

FEATURES = frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
if config.CPU_FEATURES is not None:  # numba compiles for another processor than this one
    FEATURES = frozenset(word[1:] for word in config.CPU_FEATURES.split(",") if word.startswith("+"))
elif not config.ENABLE_AVX:
    FEATURES = frozenset(name for name in FEATURES if not name.startswith("avx"))

WRITING = 1 << 62
"""In a worker's status: its results are being stored."""
IDLE, TAKEN = 0, -1
"""A worker's status without a claim, and with one that was taken from it."""


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(_typing: Any, address: Any, amount: Any) -> Any:  # noqa: ARG001
    """Adds to the word at `address` in one atomic step; returns what it was before."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], I64.as_pointer()), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def load(_typing: Any, address: Any) -> Any:  # noqa: ARG001
    """The word at `address`, with all that its writer wrote before it."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], I64.as_pointer()), "acquire", 8, typ=I64)

    return types.int64(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def store(_typing: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """Writes the word at `address` for all threads to see, with all that was written before it."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], I64.as_pointer()), "release", 8)
        return ir.Constant(I64, 0)

    return types.int64(types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def pause(_typing: Any) -> Any:
    """Tells the processor that this loop waits (x86: PAUSE)."""

    def build(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if "sse2" in FEATURES:
            builder.call(llvm_function(builder, "llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])), [])
        return ir.Constant(I64, 0)

    return types.int64(), build


@intrinsic  # type: ignore[untyped-decorator]
def replace(_typing: Any, address: Any, old: Any, new: Any) -> Any:  # noqa: ARG001
    """Replaces the word at `address` by `new` if it is `old`, in one atomic step; true if it was."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        found = builder.cmpxchg(pointer, arguments[1], arguments[2], "acq_rel", "acquire")
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64, types.int64), build


@inner
def begin_writing(status: int, token: int) -> bool:
    """False if the claim `token` was taken from the worker whose status is at `status`; 0 there is the caller, from
    whom none is taken."""
    return status == 0 or replace(status, token, token | WRITING)


@inner
def end_writing(status: int, token: int) -> None:
    """Results are stored; the claim may be taken again."""
    if status != 0:
        store(status, token)
