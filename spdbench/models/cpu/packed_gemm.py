"""Products of a few rows with a weight that is read once, straight from memory: compiled by numba.

A weight `[N, K]` is laid out for this: blocks of 16 outputs, in each block the 16 outputs' numbers side by side for one
input after the other (bfloat16: for one pair of inputs after the other). A block is then one run of memory, read from
front to back and asked for ahead of time; the 16 sums of up to 16 rows stay in registers; no sum is taken across a
register, so a row's result is the same to the last bit whoever stands beside it. As long as memory is
what they wait for, one row or eight cost the same; how long that is depends on the processor (benchmarks/README.md).

Must not know torch, layers or models, nor who else works on a product. Importing this module needs numba.

Shapes: S rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, config, types
from numba.extending import intrinsic

from spdbench.models.cpu.kernels import F, inner, narrow, widen

WIDTH = 16
"""Outputs of a block: a register of float32 where registers are widest, more registers elsewhere."""
AHEAD = 4096
"""How many bytes ahead of their use a weight's numbers are asked for."""
FEATURES = frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
if config.CPU_FEATURES is not None:  # numba compiles for another processor than this one
    FEATURES = frozenset(word[1:] for word in config.CPU_FEATURES.split(",") if word.startswith("+"))
PAIRS_AT_ONCE = "avx512bf16" in FEATURES
"""The processor multiplies pairs of bfloat16 by itself."""
MOST_ROWS = 16 if "avx512f" in FEATURES else 4
"""Rows whose sums fit the registers."""

WEIGHT, ROWS, OUT, OTHER, BIAS, NUM_ROWS, NUM_OUTPUTS, STEPS, ROW_BYTES, IS_PAIRS = range(10)
"""A product as words of 8 bytes: addresses, of which OTHER and BIAS may be 0; sizes; whether numbers are bfloat16."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(_I32, WIDTH)


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@intrinsic  # type: ignore[untyped-decorator]
def _tile(_typing: Any, weight: Any, rows: Any, row_bytes: Any, last: Any, steps: Any, sums: Any, num: Any, pairs: Any):  # type: ignore[no-untyped-def]
    """The sums `[num, 16]` in float32 of one block for `num` rows, the last of which may be row `last` repeated.

    `weight`, `rows` and `sums` are addresses; `num` and `pairs` (numbers are bfloat16) are known when compiling.
    """
    if not (isinstance(num, types.IntegerLiteral) and isinstance(pairs, types.BooleanLiteral)):
        return None
    count, is_pairs = num.literal_value, pairs.literal_value

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weight_at, rows_at, stride, last_row, num_steps, sums_at, _, _ = arguments
        at = [
            builder.add(rows_at, builder.mul(stride, _smaller(builder, ir.Constant(_I64, r), last_row)))
            for r in range(count)
        ]
        before, loop, after = builder.block, builder.append_basic_block("step"), builder.append_basic_block("summed")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(ir.Constant(_I64, 0), before)
        totals = [builder.phi(_FLOATS) for _ in range(count)]
        offset = builder.add(weight_at, builder.shl(step, ir.Constant(_I64, 6)))
        numbers = builder.load(builder.inttoptr(offset, _WORDS.as_pointer()), align=64, typ=_WORDS)
        _ask_for(builder, builder.add(offset, ir.Constant(_I64, AHEAD)))
        shift = builder.shl(step, ir.Constant(_I64, 2))
        for r, total in enumerate(totals):
            total.add_incoming(ir.Constant(_FLOATS, [0.0] * WIDTH), before)
            word = builder.load(builder.inttoptr(builder.add(at[r], shift), _I32.as_pointer()), typ=_I32)
            total.add_incoming(_more(builder, total, numbers, word, is_pairs), loop)
        following = builder.add(step, ir.Constant(_I64, 1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_steps), loop, after)
        builder.position_at_end(after)
        for r, total in enumerate(totals):
            place = builder.add(sums_at, ir.Constant(_I64, 4 * WIDTH * r))
            builder.store(total.incomings[1][0], builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
        return ir.Constant(_I64, 0)

    return types.int64(weight, rows, row_bytes, last, steps, sums, num, pairs), build


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _ask_for(builder: Any, address: Any) -> None:
    """Prefetch, to be read, and kept close."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = declared(builder, "llvm.prefetch.p0", kind)
    builder.call(function, [builder.inttoptr(address, pointer), *(ir.Constant(_I32, value) for value in (0, 3, 1))])


def _more(builder: Any, total: Any, numbers: Any, word: Any, is_pairs: bool) -> Any:
    """16 sums, each with the product of a row's number or pair of numbers and its own added."""
    words = builder.shuffle_vector(
        builder.insert_element(ir.Constant(_WORDS, ir.Undefined), word, ir.Constant(_I32, 0)),
        ir.Constant(_WORDS, ir.Undefined),
        ir.Constant(_WORDS, [0] * WIDTH),
    )
    if not is_pairs:
        return _fused(builder, builder.bitcast(words, _FLOATS), builder.bitcast(numbers, _FLOATS), total)
    if PAIRS_AT_ONCE:
        brains = ir.VectorType(_BFloat(), 2 * WIDTH)
        kind = ir.FunctionType(_FLOATS, [_FLOATS, brains, brains])
        function = declared(builder, "llvm.x86.avx512bf16.dpbf16ps.512", kind)
        return builder.call(function, [total, builder.bitcast(words, brains), builder.bitcast(numbers, brains)])
    for first in (True, False):
        total = _fused(builder, _half(builder, words, first), _half(builder, numbers, first), total)
    return total


def _fused(builder: Any, some: Any, others: Any, total: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(declared(builder, f"llvm.fma.v{WIDTH}f32", kind), [some, others, total])


def _half(builder: Any, words: Any, first: bool) -> Any:
    """The first or the second bfloat16 of each pair, as float32."""
    if first:
        return builder.bitcast(builder.shl(words, ir.Constant(_WORDS, [16] * WIDTH)), _FLOATS)
    return builder.bitcast(builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * WIDTH)), _FLOATS)


def declared(builder: Any, name: str, kind: Any) -> Any:
    """One of LLVM's own functions."""
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@intrinsic  # type: ignore[untyped-decorator]
def numbers_at(_typing: Any, address: Any, like: Any) -> Any:  # noqa: ARG001
    """A pointer to numbers of the type of `like` at `address`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), build


@inner
def _sum_up(weight: int, rows: int, row_bytes: int, count: int, steps: int, sums: Any, pairs: bool) -> None:
    """`_tile` for as many rows as there are, or a few more."""
    last = count - 1
    if pairs:
        if count == 1:
            _tile(weight, rows, row_bytes, last, steps, sums, 1, True)
        elif count == 2:
            _tile(weight, rows, row_bytes, last, steps, sums, 2, True)
        elif count <= 4:
            _tile(weight, rows, row_bytes, last, steps, sums, 4, True)
        elif count <= 6:
            _tile(weight, rows, row_bytes, last, steps, sums, 6, True)
        elif count <= 8:
            _tile(weight, rows, row_bytes, last, steps, sums, 8, True)
        elif count <= 12:
            _tile(weight, rows, row_bytes, last, steps, sums, 12, True)
        else:
            _tile(weight, rows, row_bytes, last, steps, sums, 16, True)
    else:
        if count == 1:
            _tile(weight, rows, row_bytes, last, steps, sums, 1, False)
        elif count == 2:
            _tile(weight, rows, row_bytes, last, steps, sums, 2, False)
        elif count <= 4:
            _tile(weight, rows, row_bytes, last, steps, sums, 4, False)
        elif count <= 6:
            _tile(weight, rows, row_bytes, last, steps, sums, 6, False)
        elif count <= 8:
            _tile(weight, rows, row_bytes, last, steps, sums, 8, False)
        elif count <= 12:
            _tile(weight, rows, row_bytes, last, steps, sums, 12, False)
        else:
            _tile(weight, rows, row_bytes, last, steps, sums, 16, False)


@inner
def _finish(job: Any, first_row: int, count: int, first: int, sums: Any, like: Any) -> None:
    """Bias and another summand added, rounded, put where they belong; what is beyond the last output is left out."""
    width = job[NUM_OUTPUTS]
    size = np.int64(2) if job[IS_PAIRS] else np.int64(4)
    for r in range(count):
        at = ((first_row + r) * width + first) * size
        out = carray(numbers_at(job[OUT] + at, like), WIDTH)
        other = carray(numbers_at(job[OTHER] + at, like), WIDTH)
        bias = carray(numbers_at(job[BIAS] + first * size, like), WIDTH)
        stop = min(WIDTH, width - first)
        if stop < WIDTH or job[BIAS] != 0:
            for n in range(stop):
                total = sums[r, n]
                if job[BIAS] != 0:
                    total += widen(bias[n])
                if job[OTHER] != 0:
                    total += widen(other[n])
                out[n] = narrow(total, like)
        elif job[OTHER] != 0:  # what follows is known to be 16 wide, which compilers make the most of
            for n in range(WIDTH):
                out[n] = narrow(sums[r, n] + widen(other[n]), like)
        else:
            for n in range(WIDTH):
                out[n] = narrow(sums[r, n], like)


@inner
def num_blocks(job: Any) -> Any:
    """Blocks of outputs of a product."""
    return (job[NUM_OUTPUTS] + WIDTH - 1) // WIDTH


@inner
def multiply_blocks(job: Any, begin: int, end: int) -> None:
    """The outputs of some blocks of a product."""
    num_rows, steps = job[NUM_ROWS], job[STEPS]
    sums = np.empty((MOST_ROWS, WIDTH), F)
    for block in range(begin, end):
        weight = job[WEIGHT] + block * steps * 64
        for first_row in range(0, num_rows, MOST_ROWS):
            count = min(MOST_ROWS, num_rows - first_row)
            rows = job[ROWS] + first_row * job[ROW_BYTES]
            _sum_up(weight, rows, job[ROW_BYTES], count, steps, np.int64(sums.ctypes.data), job[IS_PAIRS] != 0)
            if job[IS_PAIRS]:
                _finish(job, first_row, count, block * WIDTH, sums, np.uint16(0))
            else:
                _finish(job, first_row, count, block * WIDTH, sums, F(0))
