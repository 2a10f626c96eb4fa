"""Matrix multiplications of a few rows with a packed weight, which is read once, straight from memory: compiled by
numba.

A packed weight `[N, K]` consists of blocks of 16 outputs; in each block the 16 outputs' numbers lie side by side for
one input after the other (bfloat16: for one pair of inputs after the other). A block is thus one run of memory, read
from front to back and prefetched. The 16 sums of up to 16 rows, a tile, stay in registers. No sum is taken across a
register, so a row's result has the same bits whatever rows are next to it. As long as the processor waits for memory,
one row or eight cost the same; how long that holds depends on the processor (benchmarks/README.md).

Rows of bfloat16 can be multiplied with weights in 8 bits, which have a scale for each output. Of the pairs of a step
the 16 first numbers lie before the 16 second ones. In the loop they are widened once for all rows of a tile; the scale
is applied to the sums. Each addition to a sum waits for the one before it, which with half as many bytes takes longer
than reading them. Even and odd pairs therefore have sums of their own, whatever the number of rows, and a tile has half
as many rows.

Where the processor has AMX, weights in bfloat16 that fill its tiles are multiplied by it, whatever the number of rows:
it adds in an order of its own, and one row has to get the same bits as many.

Shapes: S rows, K inputs, N outputs.
"""

from __future__ import annotations

from itertools import chain as joined
from typing import Any, Literal

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from spdbench.models.cpu.amx import (
    AMX_BLOCKS,
    AMX_ROWS,
    AMX_SUMS_BYTES,
    HAS_AMX,
    configure_amx,
    release_amx,
    sum_with_amx,
)
from spdbench.models.cpu.claims import begin_writing, end_writing
from spdbench.models.cpu.compile import (
    I32,
    I64,
    PREFETCH_BYTES,
    F,
    in_order,
    inner,
    narrow,
    pointer_to,
    prefetch,
    stack_memory,
    widen,
)
from spdbench.models.cpu.vectors import (
    FLOATS,
    HAS_WIDE_REGISTERS,
    MULTIPLIES_PAIRS,
    WIDTH,
    WORDS,
    add_pair_products,
    add_products,
    load,
    pair_factors,
    splat,
    zeros,
)

BLOCK_STEP_BYTES = 64
"""What a block holds of one step: 16 float32, 16 pairs of bfloat16, or twice 16 pairs in 8 bits."""
TILE_ROWS = (1, 2, 4, 6, 8, 12, 16) if HAS_WIDE_REGISTERS else (1, 2, 4, 6)
"""Numbers of rows that have a loop of their own; the sums of the most rows just fit the registers."""
MAX_TILE_ROWS = TILE_ROWS[-1]
TOO_FEW_ROWS = 0 if HAS_WIDE_REGISTERS else 3
"""A last tile of fewer rows takes as long as one of four, since each sum waits for itself: two tiles share them."""
MAX_SCALED_ROWS = max(count for count in TILE_ROWS if 2 * count <= MAX_TILE_ROWS)
"""The most rows of a tile where weights are in 8 bits: each output has two sums."""
_sums_memory = stack_memory(max(4 * WIDTH * MAX_TILE_ROWS, AMX_SUMS_BYTES * AMX_BLOCKS))

Numbers = Literal["float32", "bfloat16", "int8"]
"""What a weight consists of."""


@intrinsic  # type: ignore[untyped-decorator]
def _sum_block(  # type: ignore[no-untyped-def]
    _typing: Any, weight: Any, scale: Any, rows: Any, row_bytes: Any, count: Any, steps: Any, sums: Any, like: Any
):
    """The sums `[count, 16]` in float32 of one block for `count` rows of numbers of the type of `like`.

    `weight`, `scale`, `rows` and `sums` are addresses; a scale makes it a weight in 8 bits, and 0 one of the rows'
    type.
    """

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        summed = builder.append_basic_block("summed")
        if like == types.uint16:
            scaled, unscaled = builder.append_basic_block("scaled"), builder.append_basic_block("unscaled")
            builder.cbranch(builder.icmp_signed("!=", arguments[1], ir.Constant(I64, 0)), scaled, unscaled)
            builder.position_at_end(scaled)
            _build_tiles(builder, arguments, "int8", summed)
            builder.position_at_end(unscaled)
        _build_tiles(builder, arguments, "bfloat16" if like == types.uint16 else "float32", summed)
        builder.position_at_end(summed)
        return ir.Constant(I64, 0)

    return types.int64(weight, scale, rows, row_bytes, count, steps, sums, like), build


def _build_tiles(builder: Any, arguments: Any, numbers: Numbers, summed: Any) -> None:
    """One loop for each number of rows in `TILE_ROWS`, and a choice of the smallest that holds all rows; what it has
    too many repeats the last row, at no cost in memory. Goes on in the block `summed`."""
    most = MAX_SCALED_ROWS if numbers == "int8" else MAX_TILE_ROWS
    for tile_rows in (count for count in TILE_ROWS if count <= most):
        tile, larger = builder.append_basic_block("tile"), builder.append_basic_block("larger")
        builder.cbranch(builder.icmp_signed("<=", arguments[4], ir.Constant(I64, tile_rows)), tile, larger)
        builder.position_at_end(tile)
        _build_tile(builder, arguments, tile_rows, numbers)
        builder.branch(summed)
        builder.position_at_end(larger)
    builder.unreachable()


def _build_tile(builder: Any, arguments: Any, tile_rows: int, numbers: Numbers) -> None:
    """The loop over all steps for `tile_rows` rows, whose sums are stored at its end."""
    weight, scale, rows, row_bytes, num_rows, num_steps, sums, _ = arguments
    chains = range(_num_chains(numbers))
    last = builder.sub(num_rows, ir.Constant(I64, 1))
    row_at = [
        builder.add(rows, builder.mul(row_bytes, _smaller(builder, ir.Constant(I64, r), last)))
        for r in range(tile_rows)
    ]
    if numbers == "int8":
        prefetch(builder, scale)
    before, loop, after = builder.block, builder.append_basic_block("step"), builder.append_basic_block("store")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(ir.Constant(I64, 0), before)
    totals = [[builder.phi(FLOATS) for _ in chains] for _ in range(tile_rows)]
    weight_at = builder.add(weight, builder.mul(step, ir.Constant(I64, BLOCK_STEP_BYTES)))
    factors = _load_factors(builder, weight_at, numbers)
    prefetch(builder, builder.add(weight_at, ir.Constant(I64, PREFETCH_BYTES)))
    offset = builder.mul(step, ir.Constant(I64, 4 * len(chains)))
    found = [list(sums_of_row) for sums_of_row in totals]
    add = add_products if numbers == "float32" else add_pair_products
    for chain in chains:
        # All rows with one factor, then all with the next, so that no more than one needs a register.
        for part, factor in enumerate(factors[chain]):
            for at, sums_of_row in zip(row_at, found, strict=True):
                word_at = builder.add(builder.add(at, offset), ir.Constant(I64, 4 * chain))
                word = builder.load(builder.inttoptr(word_at, I32.as_pointer()), typ=I32)
                of_row = _row_factors(builder, word, numbers)[part]
                sums_of_row[chain] = add(builder, sums_of_row[chain], of_row, factor)
    for total, end in zip(joined(*totals), joined(*found), strict=True):
        total.add_incoming(zeros(), before)
        total.add_incoming(end, loop)
    following = builder.add(step, ir.Constant(I64, 1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_steps), loop, after)
    builder.position_at_end(after)
    scales = load(builder, scale, FLOATS, 4) if numbers == "int8" else None
    for r, sums_of_row in enumerate(totals):
        sums_at = builder.add(sums, ir.Constant(I64, 4 * WIDTH * r))
        found, *others = (total.incomings[1][0] for total in sums_of_row)
        for other in others:
            found = builder.fadd(found, other)
        # A product of its own, which is never contracted with the summand that follows it.
        found = found if scales is None else builder.fmul(found, scales)
        builder.store(found, builder.inttoptr(sums_at, FLOATS.as_pointer()), align=4)


def _num_chains(numbers: Numbers) -> int:
    """How many sums an output of a row has, which are added in the end."""
    return 2 if numbers == "int8" else 1


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _load_factors(builder: Any, address: Any, numbers: Numbers) -> list[tuple[Any, ...]]:
    """A step's weights for each sum: 16 float32; or 16 pairs of bfloat16, in two vectors of float32 where no
    instruction multiplies pairs."""
    if numbers == "float32":
        return [(load(builder, address, FLOATS, BLOCK_STEP_BYTES),)]
    if numbers == "bfloat16":
        weights = load(builder, address, WORDS, BLOCK_STEP_BYTES)
        return [pair_factors(builder, weights)]
    return [_widen_pairs(builder, builder.add(address, ir.Constant(I64, at))) for at in (0, 2 * WIDTH)]


def _widen_pairs(builder: Any, address: Any) -> tuple[Any, ...]:
    """16 pairs in 8 bits as factors: such whole numbers are bfloat16 without rounding, so the lower half of their bits
    as float32 is 0. Shifting the upper half down is two fast instructions on every processor; picking the upper halves
    out of a register of 16-bit numbers is a hundred where LLVM knows such numbers as floats (avx512fp16)."""
    whole = (
        load(builder, builder.add(address, ir.Constant(I64, at)), ir.VectorType(ir.IntType(8), WIDTH), WIDTH)
        for at in (0, WIDTH)
    )
    first, second = (builder.sitofp(builder.sext(numbers, WORDS), FLOATS) for numbers in whole)
    if not MULTIPLIES_PAIRS:
        return first, second
    lower = builder.lshr(builder.bitcast(first, WORDS), ir.Constant(WORDS, [16] * WIDTH))
    return (builder.or_(lower, builder.bitcast(second, WORDS)),)


def _row_factors(builder: Any, word: Any, numbers: Numbers) -> tuple[Any, ...]:
    """A row's number, or pair of numbers, for all 16 outputs, in the places of `_load_factors`."""
    words = splat(builder, word)
    return (builder.bitcast(words, FLOATS),) if numbers == "float32" else pair_factors(builder, words)


@in_order
def _store_outputs(task: Any, first_row: int, count: int, first: int, sums: Any, like: Any) -> None:
    """Adds the bias and the other summand, rounds, and stores a block's outputs from output `first` on, without the
    padding behind the last one."""
    num_outputs = task.num_outputs
    for r in range(count):
        at = (first_row + r) * num_outputs + first
        out = carray(pointer_to(task.out, at, like), WIDTH)
        other = carray(pointer_to(task.other, at, like), WIDTH)
        bias = carray(pointer_to(task.bias, first, like), WIDTH)
        stop = min(WIDTH, num_outputs - first)
        if stop < WIDTH or task.bias != 0:
            for n in range(stop):
                total = sums[r, n]
                if task.bias != 0:
                    total += widen(bias[n])
                if task.other != 0:
                    total += widen(other[n])
                out[n] = narrow(total, like)
        elif task.other != 0:  # in these two loops the compiler knows the length, and vectorises them whole
            for n in range(WIDTH):
                out[n] = narrow(sums[r, n] + widen(other[n]), like)
        else:
            for n in range(WIDTH):
                out[n] = narrow(sums[r, n], like)


@inner
def num_blocks(task: Any) -> Any:
    """Blocks of outputs of `task`, a `worker_pool.GemmTask`."""
    return (task.num_outputs + WIDTH - 1) // WIDTH


@inner
def multiply_blocks(task: Any, begin: int, end: int, like: Any, status: int, token: int) -> None:
    """The outputs of the blocks `begin` to `end` of `task`, of numbers of the type of `like`. `status` and `token`: see
    `claims.begin_writing`."""
    sums_at = _sums_memory()
    if HAS_AMX and task.uses_amx != 0:
        _multiply_with_amx(task, begin, end, sums_at, like, status, token)
        return
    sums = carray(pointer_to(sums_at, 0, F(0)), (MAX_TILE_ROWS, WIDTH))
    tile_rows = MAX_TILE_ROWS if task.scale == 0 else MAX_SCALED_ROWS
    for block in range(begin, end):
        weight = task.weight + block * task.num_steps * BLOCK_STEP_BYTES
        scale = task.scale if task.scale == 0 else task.scale + 4 * WIDTH * block
        first_row, count = 0, 0
        while first_row + count < task.num_rows:
            first_row += count
            rest = task.num_rows - first_row
            count = min(tile_rows, rest)
            if 0 < rest - count < TOO_FEW_ROWS:
                count = (rest + 1) // 2
            rows = task.rows + first_row * task.row_bytes
            _sum_block(weight, scale, rows, task.row_bytes, count, task.num_steps, sums_at, like)
            if not begin_writing(status, token):
                return
            _store_outputs(task, first_row, count, block * WIDTH, sums, like)
            end_writing(status, token)


@inner
def _multiply_with_amx(task: Any, begin: int, end: int, sums_at: int, like: Any, status: int, token: int) -> None:
    """`multiply_blocks` for a weight that fills AMX's tiles."""
    block_bytes = task.num_steps * BLOCK_STEP_BYTES
    configured = 0
    block = begin
    while block < end:
        rest = end - block
        count = AMX_BLOCKS if rest >= AMX_BLOCKS else 2 if rest >= 2 else 1
        weight = task.weight + block * block_bytes
        for first_row in range(0, task.num_rows, AMX_ROWS):
            num_rows = min(AMX_ROWS, task.num_rows - first_row)
            if num_rows != configured:
                configure_amx(num_rows)
                configured = num_rows
            rows = task.rows + first_row * task.row_bytes
            if count == 1:
                sum_with_amx(weight, block_bytes, rows, task.row_bytes, task.num_steps, sums_at, 1)
            elif count == 2:
                sum_with_amx(weight, block_bytes, rows, task.row_bytes, task.num_steps, sums_at, 2)
            else:
                sum_with_amx(weight, block_bytes, rows, task.row_bytes, task.num_steps, sums_at, AMX_BLOCKS)
            if not begin_writing(status, token):
                release_amx()
                return
            for part in range(count):
                sums = carray(pointer_to(sums_at + part * AMX_SUMS_BYTES, 0, F(0)), (AMX_ROWS, WIDTH))
                _store_outputs(task, first_row, num_rows, (block + part) * WIDTH, sums, like)
            end_writing(status, token)
        block += count
    release_amx()
