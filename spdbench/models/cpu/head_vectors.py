"""Scores and weighted sums of attention in vectors, for heads whose size is a multiple of 64; built as LLVM's own
instructions.

16 slots are scored together: each has a vector of 16 partial sums, which are added up two vectors at a time, in the
same order for every slot. Values are read once for several query heads. Of numbers in bfloat16 the even and the odd
ones are summed apart, and rounded into pairs at the end. So neither widening nor adding up costs as much as it does for
one slot and one head at a time.

Arguments are addresses and sizes. A slot's numbers lie in `[T, D]` at its index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spdbench.models.cpu.compile import I64
from spdbench.models.cpu.vectors import (
    FLOATS,
    HAS_WIDE_REGISTERS,
    WIDTH,
    WORDS,
    add_pair_products,
    add_products,
    halves,
    load,
    pair_factors,
    pick,
    splat,
    zeros,
)

FLOAT = ir.FloatType()
SLOTS_AT_ONCE = 16 if HAS_WIDE_REGISTERS else 4
"""Slots that are scored together, whose sums fill half of the registers."""
HEADS_AT_ONCE = 4 if HAS_WIDE_REGISTERS else 2
"""The most query heads whose weighted sums are taken together: likewise."""
CHUNK = 64
"""Numbers of a head that are multiplied in one step."""
SUMMED_AT_ONCE = CHUNK if HAS_WIDE_REGISTERS else CHUNK // 2
"""Numbers of a head whose weighted sums are in registers at the same time."""


def _loop(builder: Any, stop: Any, started: Sequence[Any], step: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """Runs `step` for 0, 1, ... up to `stop`, at least once, with vectors that begin as `started` and go on as `step`
    returns them; returns the last ones."""
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    current = [builder.phi(vector.type) for vector in started]
    found = step(index, list(current))
    end = builder.block
    for phi, first, following in zip(current, started, found, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(following, end)
    following = builder.add(index, ir.Constant(I64, 1))
    index.add_incoming(following, end)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, after)
    builder.position_at_end(after)
    return found


def _times(builder: Any, number: Any, constant: int) -> Any:
    return builder.mul(number, ir.Constant(I64, constant))


def _slot_at(builder: Any, first: Any, slots: Any, index: Any, row_bytes: Any) -> Any:
    """Where the numbers of slot `slots[index]` begin."""
    slot = load(builder, builder.add(slots, _times(builder, index, 8)), I64, 8)
    return builder.add(first, builder.mul(slot, row_bytes))


@intrinsic  # type: ignore[untyped-decorator]
def score_slots(  # type: ignore[no-untyped-def]
    _typing: Any, query: Any, keys: Any, slots: Any, size: Any, scores: Any, like: Any
):
    """The products of a query with the keys of the next `SLOTS_AT_ONCE` slots, in float32."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        query_at, keys_at, slots_at, head_size, scores_at, _ = arguments
        in_pairs = like == types.uint16
        itemsize = 2 if in_pairs else 4
        row_bytes = _times(builder, head_size, itemsize)
        key_at = [
            _slot_at(builder, keys_at, slots_at, ir.Constant(I64, number), row_bytes) for number in range(SLOTS_AT_ONCE)
        ]

        def factors(at: Any) -> tuple[Any, ...]:
            if in_pairs:
                return pair_factors(builder, load(builder, at, WORDS, itemsize))
            return (load(builder, at, FLOATS, itemsize),)

        def add_chunk(chunk: Any, sums: list[Any]) -> list[Any]:
            for part in range(0, CHUNK * itemsize, 4 * WIDTH):
                offset = builder.add(_times(builder, chunk, CHUNK * itemsize), ir.Constant(I64, part))
                of_query = factors(builder.add(query_at, offset))
                add = add_pair_products if in_pairs else add_products
                for slot, at in enumerate(key_at):
                    for some, others in zip(of_query, factors(builder.add(at, offset)), strict=True):
                        sums[slot] = add(builder, sums[slot], some, others)
            return sums

        num_chunks = builder.sdiv(head_size, ir.Constant(I64, CHUNK))
        sums = _add_up(builder, _loop(builder, num_chunks, [zeros()] * SLOTS_AT_ONCE, add_chunk))
        found = pick(builder, sums, sums, range(SLOTS_AT_ONCE))
        builder.store(found, builder.inttoptr(scores_at, found.type.as_pointer()), align=4)
        return ir.Constant(I64, 0)

    return types.int64(query, keys, slots, size, scores, like), build


def _add_up(builder: Any, vectors: list[Any]) -> Any:
    """The sums over each vector, one after the other, in one vector. In each round the second half of what is left of
    every sum is added to the first, and two vectors become one."""
    length = WIDTH
    while length > 1:
        half = length // 2
        lower = [lane for lane in range(2 * WIDTH) if lane % length < half]
        upper = [lane + half for lane in lower]
        pairs = zip(vectors[::2], vectors[1::2] or vectors, strict=True)
        vectors = [builder.fadd(pick(builder, a, b, lower), pick(builder, a, b, upper)) for a, b in pairs]
        length = half
    return vectors[0]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_values(  # type: ignore[no-untyped-def]
    _typing: Any,
    values: Any,
    slots: Any,
    num_slots: Any,
    size: Any,
    weights: Any,
    weight_bytes: Any,
    totals: Any,
    out: Any,
    num_heads: Any,
    like: Any,
):
    """For each of `num_heads` query heads, a constant, the sum of the slots' values times its weights, over the head's
    total: `[num_heads, D]` in the type of `like`. A head's weights are `weight_bytes` behind those of the head before;
    totals are float32."""

    def build(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values_at, slots_at, slot_count, head_size, weights_at, head_bytes, totals_at, out_at, _, _ = arguments
        in_pairs, heads = like == types.uint16, range(num_heads.literal_value)
        itemsize = 2 if in_pairs else 4
        row_bytes, chunk_bytes = _times(builder, head_size, itemsize), SUMMED_AT_ONCE * itemsize
        weight_at = [builder.add(weights_at, _times(builder, head_bytes, head)) for head in heads]

        def add_chunk(chunk: Any, _: list[Any]) -> list[Any]:
            offset = _times(builder, chunk, chunk_bytes)
            chunk_at = builder.add(values_at, offset)

            def add_slot(index: Any, sums: list[Any]) -> list[Any]:
                vectors = _chunk_vectors(builder, _slot_at(builder, chunk_at, slots_at, index, row_bytes), in_pairs)
                weights = (load(builder, builder.add(at, _times(builder, index, 4)), FLOAT, 4) for at in weight_at)
                wide = (splat(builder, weight) for weight in weights)
                products = ((weight, vector) for weight in wide for vector in vectors)
                return [add_products(builder, total, *pair) for total, pair in zip(sums, products, strict=True)]

            sums = _loop(builder, slot_count, [zeros()] * (len(heads) * SUMMED_AT_ONCE // WIDTH), add_slot)
            for head, of_head in zip(heads, _parts(sums, len(heads)), strict=True):
                total = load(builder, builder.add(totals_at, ir.Constant(I64, 4 * head)), FLOAT, 4)
                means = [builder.fdiv(each, splat(builder, total)) for each in of_head]
                head_at = builder.add(builder.add(out_at, _times(builder, row_bytes, head)), offset)
                _store_chunk(builder, head_at, means, in_pairs)
            return []

        _loop(builder, builder.sdiv(row_bytes, ir.Constant(I64, chunk_bytes)), [], add_chunk)
        return ir.Constant(I64, 0)

    return (
        types.int64(values, slots, num_slots, size, weights, weight_bytes, totals, out, num_heads, like),
        build,
    )


def _parts(vectors: list[Any], count: int) -> list[list[Any]]:
    """The vectors in so many parts of equal length."""
    length = len(vectors) // count
    return [vectors[length * part : length * (part + 1)] for part in range(count)]


def _chunk_vectors(builder: Any, address: Any, in_pairs: bool) -> list[Any]:
    """`SUMMED_AT_ONCE` numbers in float32: as they lie, or of each 16 pairs the first ones, then the second ones."""
    vectors: list[Any] = []
    for part in range(0, SUMMED_AT_ONCE * (2 if in_pairs else 4), 4 * WIDTH):
        at = builder.add(address, ir.Constant(I64, part))
        vectors += halves(builder, load(builder, at, WORDS, 2)) if in_pairs else [load(builder, at, FLOATS, 4)]
    return vectors


def _store_chunk(builder: Any, address: Any, vectors: list[Any], in_pairs: bool) -> None:
    """Stores vectors in the order of `_chunk_vectors`, rounded where numbers lie in pairs."""
    if in_pairs:
        vectors = [_rounded_pairs(builder, *pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    for number, vector in enumerate(vectors):
        at = builder.add(address, ir.Constant(I64, 4 * WIDTH * number))
        builder.store(vector, builder.inttoptr(at, vector.type.as_pointer()), align=2 if in_pairs else 4)


def _rounded_pairs(builder: Any, first: Any, second: Any) -> Any:
    """Two vectors of float32 as pairs of the nearest bfloat16, ties to even."""
    words = []
    for vector in (first, second):
        bits = builder.bitcast(vector, WORDS)
        odd = builder.and_(_shifted(builder, bits), ir.Constant(WORDS, [1] * WIDTH))
        words.append(builder.add(builder.add(bits, ir.Constant(WORDS, [0x7FFF] * WIDTH)), odd))
    upper = builder.and_(words[1], ir.Constant(WORDS, [0xFFFF0000] * WIDTH))
    return builder.or_(_shifted(builder, words[0]), upper)


def _shifted(builder: Any, words: Any) -> Any:
    return builder.lshr(words, ir.Constant(WORDS, [16] * WIDTH))
