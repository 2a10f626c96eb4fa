"""Compiles kernels with numba, and what every kernel is made of: bfloat16, e^x, memory at an address.

numpy has no bfloat16: kernels take it as uint16, widen it to float32 for all arithmetic, and round it to the nearest
even once at the end. Importing this module needs numba.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from spdbench.models.cpu.native import source_digest

Function = TypeVar("Function", bound=Callable[..., Any])

RELAXED = ("reassoc", "contract", "nsz", "arcp")
"""Sums may be taken in any order and products contracted; not-a-number and infinity keep their meaning."""
F = np.float32
LOG2_E = F(1.44269504)
LN2_HIGH, LN2_LOW = F(0.693359375), F(-2.12194440e-4)
MIN_EXPONENT, MAX_EXPONENT = F(-87.0), F(88.0)

CACHE_LINE = 64
PREFETCH_BYTES = 4096
"""How far ahead of its use a weight is prefetched."""
I32, I64 = ir.IntType(32), ir.IntType(64)


def compiled(function: Function, fastmath: Collection[str] = RELAXED, *, entry: bool = True) -> Function:
    """`function` as machine code; as an `entry`, which Python calls, cached on disk where a folder can be written.

    What only compiled code calls is no entry: it is inlined into its callers. As a function of its own it would exist
    in two copies, one in its caller's cache file and one in its own, which round differently; which one runs would
    depend on whether the caller was compiled in this process or loaded from disk.
    """
    flags: dict[str, Any] = {"fastmath": set(fastmath), "error_model": "numpy", "nogil": True, "forceinline": not entry}
    try:
        machine_code: Any = njit(cache=entry, **flags)(function)
        if entry:  # numba looks at the date of this function's file alone, not at those of what is inlined into it
            with suppress(AttributeError):  # NUMBA_DISABLE_JIT, or a numba that keeps its files otherwise
                index = machine_code._cache._cache_file
                index._source_stamp = index._source_stamp, source_digest()
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        machine_code = njit(**flags)(function)
    return cast(Function, machine_code)


inner = partial(compiled, entry=False)
in_order = partial(inner, fastmath=("contract",))
"""For all that is no sum over a loop: terms are taken in the order in which they stand. Where arrays might overlap, by
their addresses, the compiler runs another loop, which would take relaxed terms in another order: the same numbers would
give other bits in other places of the memory."""


@intrinsic  # type: ignore[untyped-decorator]
def widen(_typing: Any, value: Any) -> Any:
    """A bfloat16 held in a uint16, or a float32, as float32."""
    if value == types.float32:
        return types.float32(types.float32), lambda _context, _builder, _signature, arguments: arguments[0]

    def shift(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.zext(arguments[0], I32)
        return builder.bitcast(builder.shl(bits, ir.Constant(I32, 16)), ir.FloatType())

    return types.float32(types.uint16), shift


@intrinsic  # type: ignore[untyped-decorator]
def narrow(_typing: Any, value: Any, like: Any) -> Any:
    """A float32 in the type of `like`: itself, or the nearest bfloat16, ties to even, as a uint16."""
    if like == types.float32:
        return types.float32(value, like), lambda _context, _builder, _signature, arguments: arguments[0]

    def rounded(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        nearest = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(nearest, ir.Constant(I32, 16)), ir.IntType(16))

    return types.uint16(types.float32, types.uint16), rounded


@intrinsic  # type: ignore[untyped-decorator]
def float_from_bits(_typing: Any, bits: Any) -> Any:  # noqa: ARG001 - numba reads the signature
    """The float32 with an int32's bits."""

    def bitcast(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), bitcast


@in_order
def exponential(x: Any) -> Any:
    """e^x in float32 to about one unit in the last place, without a call, so that a loop over it is vectorised.

    x = n ln 2 + r with |r| <= ln 2 / 2; the Taylor polynomial of e^r to degree 7 errs by less than 1e-8 there; ln 2 in
    two parts keeps n ln 2 exact, as long as the order of the terms is kept. Below -87 it stays at e^-87, which no sum
    in float32 notices; above 88, where float32 ends, at e^88.
    """
    x = min(max(x, MIN_EXPONENT), MAX_EXPONENT)
    n = np.floor(x * LOG2_E + F(0.5))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = F(1.0 / 5040.0)
    p = p * r + F(1.0 / 720.0)
    p = p * r + F(1.0 / 120.0)
    p = p * r + F(1.0 / 24.0)
    p = p * r + F(1.0 / 6.0)
    p = p * r + F(0.5)
    p = p * r + F(1.0)
    p = p * r + F(1.0)
    return p * float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


def llvm_function(builder: Any, name: str, kind: Any) -> Any:
    """One of LLVM's own functions, declared in the module that is being built."""
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def prefetch(builder: Any, address: Any) -> None:
    """Fetches the cache line at the address: for reading (0), into all levels of cache (3), as data (1)."""
    pointer = ir.IntType(8).as_pointer()
    function = llvm_function(builder, "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32]))
    builder.call(function, [builder.inttoptr(address, pointer), *(ir.Constant(I32, value) for value in (0, 3, 1))])


@intrinsic  # type: ignore[untyped-decorator]
def pointer_to(_typing: Any, address: Any, index: Any, like: Any) -> Any:  # noqa: ARG001
    """A pointer to number `index` of an array at `address`, whose numbers have the type of `like`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
        return builder.gep(first, [arguments[1]])

    return types.CPointer(like)(types.int64, types.int64, like), build


@intrinsic  # type: ignore[untyped-decorator]
def record_at(_typing: Any, address: Any, dtype: Any) -> Any:  # noqa: ARG001
    """The record of the structured numpy type `dtype` at `address`, whose fields are read by name."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return dtype.dtype(types.int64, dtype), build


def stack_memory(num_bytes: int) -> Any:
    """A function that gives the address of so many bytes on the stack of the function that it is compiled into."""

    @intrinsic  # type: ignore[untyped-decorator]
    def address(_typing: Any) -> Any:
        def build(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
            place = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), num_bytes))
            place.align = CACHE_LINE
            return builder.ptrtoint(place, I64)

        return types.int64(), build

    return address


@intrinsic  # type: ignore[untyped-decorator]
def allocate(_typing: Any, num_bytes: Any) -> Any:  # noqa: ARG001
    """The address of new memory, for `free`: by the C library, as numba's own arrays need numba's runtime."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(8).as_pointer(), [I64])
        return builder.ptrtoint(builder.call(llvm_function(builder, "malloc", kind), arguments), I64)

    return types.int64(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def free(_typing: Any, address: Any) -> Any:  # noqa: ARG001
    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function = llvm_function(builder, "free", ir.FunctionType(ir.VoidType(), [pointer]))
        builder.call(function, [builder.inttoptr(arguments[0], pointer)])
        return ir.Constant(I64, 0)

    return types.int64(types.int64), build
