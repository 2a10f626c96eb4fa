"""Vectors of 16 numbers for kernels that are built as LLVM's own instructions: loads, products, pairs of bfloat16.

A pair of bfloat16 that lie next to each other is a word of 32 bits. Where the processor multiplies pairs, two vectors
of words are multiplied as they are; elsewhere both are taken apart into two vectors of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from spdbench.models.cpu.claims import FEATURES
from spdbench.models.cpu.compile import I32, llvm_function

WIDTH = 16
"""Numbers of a vector: a register of float32 where registers are widest, more registers elsewhere."""
HAS_WIDE_REGISTERS = "avx512f" in FEATURES
MULTIPLIES_PAIRS = "avx512bf16" in FEATURES
"""The processor has an instruction for pairs of bfloat16."""
FLOATS, WORDS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(I32, WIDTH)


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    """A number or a vector of the type `kind`."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align, typ=kind)


def zeros() -> Any:
    """16 float32."""
    return ir.Constant(FLOATS, [0.0] * WIDTH)


def pick(builder: Any, some: Any, others: Any, lanes: Sequence[int]) -> Any:
    """Lanes of two vectors, of which the second's are counted on from the first's."""
    return builder.shuffle_vector(some, others, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(builder: Any, word: Any) -> Any:
    """16 times a number of 32 bits."""
    undefined = ir.Constant(ir.VectorType(word.type, WIDTH), ir.Undefined)
    return pick(builder, builder.insert_element(undefined, word, ir.Constant(I32, 0)), undefined, [0] * WIDTH)


def add_products(builder: Any, total: Any, some: Any, others: Any) -> Any:
    """`total` and the products, rounded once."""
    function = llvm_function(builder, f"llvm.fma.v{WIDTH}f32", ir.FunctionType(FLOATS, [FLOATS] * 3))
    return builder.call(function, [some, others, total])


def halves(builder: Any, words: Any) -> tuple[Any, Any]:
    """The first and the second bfloat16 of each pair, as float32."""
    first = builder.shl(words, ir.Constant(WORDS, [16] * WIDTH))
    second = builder.and_(words, ir.Constant(WORDS, [0xFFFF0000] * WIDTH))
    return builder.bitcast(first, FLOATS), builder.bitcast(second, FLOATS)


def pair_factors(builder: Any, words: Any) -> tuple[Any, ...]:
    """Pairs of bfloat16 as `add_pair_products` takes them."""
    return (words,) if MULTIPLIES_PAIRS else halves(builder, words)


def add_pair_products(builder: Any, total: Any, some: Any, others: Any) -> Any:
    """The part of the pairs' products that `some` and `others`, of the same place in `pair_factors`, add to `total`."""
    if not MULTIPLIES_PAIRS:
        return add_products(builder, total, some, others)
    pairs = ir.VectorType(_BFloat(), 2 * WIDTH)
    kind = ir.FunctionType(FLOATS, [FLOATS, pairs, pairs])
    function = llvm_function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", kind)
    return builder.call(function, [total, builder.bitcast(some, pairs), builder.bitcast(others, pairs)])
