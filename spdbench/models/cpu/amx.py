"""Sums of up to 16 rows with blocks of a packed weight in the tiles of Intel's AMX, compiled by numba.

A tile is a register of 16 rows of 64 bytes. 16 steps of a block in bfloat16, as `packed_gemm` lays them out, are a tile
as the instruction TDPBF16PS wants it, so weights go from memory to the tiles unchanged, and 16 rows take hardly longer
than one. A process needs leave for tiles (`processors.may_use_amx`), and each thread has to configure its own.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from spdbench.models.cpu.claims import FEATURES
from spdbench.models.cpu.compile import (
    I64,
    PREFETCH_BYTES,
    inner,
    llvm_function,
    pointer_to,
    prefetch,
    stack_memory,
)
from spdbench.models.cpu.worker_pool import AMX_STEPS

HAS_AMX = "amx-bf16" in FEATURES
AMX_ROWS = 16
"""Rows whose sums a tile holds."""
ROW_BYTES, TILE_BYTES = 64, 64 * 16
AMX_SUMS_BYTES = TILE_BYTES
"""What the sums of one block are stored in."""
AMX_BLOCKS = 4
"""Blocks whose sums are in tiles at the same time: an addition to a sum waits for the one before it, and rows are read
once for all blocks."""
ROWS_TILE, WEIGHT_TILES = AMX_BLOCKS, range(AMX_BLOCKS + 1, 8)
"""Of the eight tiles the first hold sums, one rows, and the rest weights in turns."""
FOUR_WIDTHS = 0x0040_0040_0040_0040
"""In a configuration: 64 bytes a row, for four tiles."""
I8 = ir.IntType(8)
_config_memory = stack_memory(64)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    """One of LLVM's functions about tiles, whose numbers are Python's."""
    values = [ir.Constant(I8, each) if isinstance(each, int) else each for each in arguments]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(llvm_function(builder, f"llvm.x86.{name}", kind), values)


@intrinsic  # type: ignore[untyped-decorator]
def _load_configuration(_typing: Any, address: Any) -> Any:  # noqa: ARG001
    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if HAS_AMX:
            _call(builder, "ldtilecfg", builder.inttoptr(arguments[0], I8.as_pointer()))
        return ir.Constant(I64, 0)

    return types.int64(types.int64), build


@inner
def configure_amx(num_rows: int) -> None:
    """This thread's tiles hold sums and numbers of `num_rows` rows, and weights of 16 steps."""
    config_at = _config_memory()
    config = carray(pointer_to(config_at, 0, np.int64(0)), 8)
    config[:] = 0
    config[0] = 1  # the palette, which is eight tiles
    config[2] = config[3] = FOUR_WIDTHS
    config[6] = 0x10_10_10_00_00_00_00_00 | num_rows * 0x01_01_01_01_01  # a byte for each tile's rows
    _load_configuration(config_at)


@intrinsic  # type: ignore[untyped-decorator]
def release_amx(_typing: Any) -> Any:
    """Empties this thread's tiles, which the system would otherwise save whenever it changes threads."""

    def build(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if HAS_AMX:
            _call(builder, "tilerelease")
        return ir.Constant(I64, 0)

    return types.int64(), build


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def sum_with_amx(  # type: ignore[no-untyped-def]
    _typing: Any, weight: Any, block_bytes: Any, rows: Any, row_bytes: Any, num_steps: Any, sums: Any, count: Any
):
    """The sums of `count` blocks, a constant, for as many rows as tiles are configured for: `[count, 16, 16]` in
    float32. All but `count` are addresses and sizes; `num_steps` is a multiple of 16."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if HAS_AMX:
            _build_loop(builder, arguments, count.literal_value)
        return ir.Constant(I64, 0)

    return types.int64(weight, block_bytes, rows, row_bytes, num_steps, sums, count), build


def _build_loop(builder: Any, arguments: Any, count: int) -> None:
    weight, block_bytes, rows, row_bytes, num_steps, sums, _ = arguments
    for block in range(count):
        _call(builder, "tilezero", block)
    before, loop, after = builder.block, builder.append_basic_block("tiles"), builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(ir.Constant(I64, 0), before)
    _load_tile(builder, ROWS_TILE, builder.add(rows, builder.mul(step, ir.Constant(I64, 4))), row_bytes)
    weight_at = builder.add(weight, builder.mul(step, ir.Constant(I64, ROW_BYTES)))
    for block in range(count):
        for line in range(0, TILE_BYTES, ROW_BYTES):
            prefetch(builder, builder.add(weight_at, ir.Constant(I64, PREFETCH_BYTES + line)))
        weight_tile = WEIGHT_TILES[block % len(WEIGHT_TILES)]
        _load_tile(builder, weight_tile, weight_at, ir.Constant(I64, ROW_BYTES))
        _call(builder, "tdpbf16ps", block, ROWS_TILE, weight_tile)
        weight_at = builder.add(weight_at, block_bytes)
    following = builder.add(step, ir.Constant(I64, AMX_STEPS))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_steps), loop, after)
    builder.position_at_end(after)
    for block in range(count):
        sums_at = builder.inttoptr(builder.add(sums, ir.Constant(I64, AMX_SUMS_BYTES * block)), I8.as_pointer())
        _call(builder, "tilestored64", block, sums_at, ir.Constant(I64, ROW_BYTES))


def _load_tile(builder: Any, tile: int, address: Any, row_bytes: Any) -> None:
    _call(builder, "tileloadd64", tile, builder.inttoptr(address, I8.as_pointer()), row_bytes)
