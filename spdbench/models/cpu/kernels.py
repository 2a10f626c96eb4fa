"""What a layer does between two products, for a few rows on a CPU: compiled by numba, one call for many operators.

A product over one row takes tens of microseconds; each torch operator beside it costs several more, and a layer has
some twenty-five of them. These functions do the same arithmetic in one pass over memory each, on one thread, because
the rows are few and the other threads wait inside the products' own pool. bfloat16 arrives as uint16 (numpy knows no
such type), is widened to float32 for all arithmetic, and rounded to the nearest even once at the end.

Must not know torch, layers or models. Importing this module needs numba; `steps` does without it where it is missing.

Shapes: S rows, M width, F feed-forward width, H query heads, K kv heads, T slots, D head size, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

RELAXED = ("reassoc", "contract", "nsz", "arcp")
"""Sums may be taken in any order and products contracted; not-a-number and infinity keep their meaning."""
F = np.float32
LOG2_E = F(1.44269504)
LN2_HIGH, LN2_LOW = F(0.693359375), F(-2.12194440e-4)
SMALLEST_EXPONENT = F(-87.0)
MINUS_INFINITY = F(-np.inf)


def compiled(function: Function, fastmath: Collection[str] = RELAXED, *, entry: bool = True) -> Function:
    """`function` as machine code; as an `entry`, which Python calls, kept on disk between runs where a folder can be
    written.

    What only compiled code calls is no entry: it becomes part of whoever calls it. As a function of its own it would be
    there in two copies, that of its caller's file and that of its own, which round differently; which one runs would
    hang on whether the caller was compiled in this process or came from disk.
    """
    flags: dict[str, Any] = {"fastmath": set(fastmath), "error_model": "numpy", "nogil": True, "forceinline": not entry}
    try:
        machine_code: Function = njit(cache=entry, **flags)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        machine_code = njit(**flags)(function)
    return machine_code


inner = partial(compiled, entry=False)


@intrinsic  # type: ignore[untyped-decorator]
def widen(_typing: Any, value: Any) -> Any:
    """A bfloat16 held in a uint16, or a float32, as float32."""
    if value == types.float32:
        return types.float32(types.float32), lambda _context, _builder, _signature, arguments: arguments[0]

    def shift(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), shift


@intrinsic  # type: ignore[untyped-decorator]
def narrow(_typing: Any, value: Any, like: Any) -> Any:
    """A float32 in the type of `like`: itself, or the nearest bfloat16, ties to even, as a uint16."""
    if like == types.float32:
        return types.float32(value, like), lambda _context, _builder, _signature, arguments: arguments[0]

    def rounded(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        nearest = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(nearest, ir.Constant(word, 16)), ir.IntType(16))

    return types.uint16(types.float32, types.uint16), rounded


@intrinsic  # type: ignore[untyped-decorator]
def _from_bits(_typing: Any, bits: Any) -> Any:  # noqa: ARG001 - numba reads the signature
    """The float32 that an int32's bits spell."""

    def bitcast(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), bitcast


@partial(inner, fastmath=("contract",))
def exponential(x: Any) -> Any:
    """e^x in float32 to about one unit in the last place, without a call, so that a loop over it is vectorised.

    x = n ln 2 + r with |r| <= ln 2 / 2; the Taylor polynomial of e^r to degree 7 errs by less than 1e-8 there; ln 2 in
    two parts keeps n ln 2 exact, as long as the order of the terms is kept. Below -87 it stays at e^-87, which no sum
    in float32 notices.
    """
    x = max(x, SMALLEST_EXPONENT)
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
    return p * _from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@compiled
def rms_norm(rows_SM: Any, weight_M: Any, eps: float, out_SM: Any) -> None:
    """Rows over their root mean square, times the weight (Zhang and Sennrich, arXiv 1910.07467)."""
    num_rows, width = rows_SM.shape
    for s in range(num_rows):
        total = F(0)
        for m in range(width):
            total += widen(rows_SM[s, m]) * widen(rows_SM[s, m])
        scale = F(1) / np.sqrt(total / F(width) + F(eps))
        for m in range(width):
            out_SM[s, m] = narrow(widen(rows_SM[s, m]) * scale * widen(weight_M[m]), out_SM[s, m])


@compiled
def gate(both_S2F: Any, out_SF: Any) -> None:
    """silu(gate) * up of rows in which the gate stands before up."""
    num_rows, width = out_SF.shape
    for s in range(num_rows):
        for f in range(width):
            x = widen(both_S2F[s, f])
            out_SF[s, f] = narrow(x / (F(1) + exponential(-x)) * widen(both_S2F[s, width + f]), out_SF[s, f])


@inner
def _turn_head(head_D: Any, norm_D: Any, eps: float, cos_D: Any, sin_D: Any, out_D: Any) -> None:
    """One head, normalised where `norm_D` is not empty, turned by its position's angles; sines bring signs along."""
    half = head_D.shape[0] // 2
    if norm_D.shape[0] == 0:
        for d in range(half):
            low, high = widen(head_D[d]), widen(head_D[half + d])
            out_D[d] = narrow(low * widen(cos_D[d]) + high * widen(sin_D[d]), out_D[d])
            out_D[half + d] = narrow(high * widen(cos_D[half + d]) + low * widen(sin_D[half + d]), out_D[d])
        return
    total = F(0)
    for d in range(2 * half):
        total += widen(head_D[d]) * widen(head_D[d])
    scale = F(1) / np.sqrt(total / F(2 * half) + F(eps))
    for d in range(half):
        low = widen(head_D[d]) * scale * widen(norm_D[d])
        high = widen(head_D[half + d]) * scale * widen(norm_D[half + d])
        out_D[d] = narrow(low * widen(cos_D[d]) + high * widen(sin_D[d]), out_D[d])
        out_D[half + d] = narrow(high * widen(cos_D[half + d]) + low * widen(sin_D[half + d]), out_D[d])


@inner
def turn_rows(
    qkv: Any,
    q_norm_D: Any,
    k_norm_D: Any,
    eps: float,
    positions_S: Any,
    cos_PD: Any,
    sin_PD: Any,
    keys_KTD: Any,
    values_KTD: Any,
    slot: int,
    queries: Any,
) -> None:
    """Splits `qkv` `[S, (H + 2K) D]`: turned queries `[S, H D]`, turned keys and plain values from `slot` on.

    Head norms are empty where the model has none.
    """
    num_kv, _, size = keys_KTD.shape
    num_heads = queries.shape[1] // size
    for s in range(positions_S.shape[0]):
        cos_D, sin_D = cos_PD[positions_S[s]], sin_PD[positions_S[s]]
        for h in range(num_heads):
            at = h * size
            _turn_head(qkv[s, at : at + size], q_norm_D, eps, cos_D, sin_D, queries[s, at : at + size])
        for k in range(num_kv):
            at = (num_heads + k) * size
            _turn_head(qkv[s, at : at + size], k_norm_D, eps, cos_D, sin_D, keys_KTD[k, slot + s])
            at += num_kv * size
            for d in range(size):
                values_KTD[k, slot + s, d] = qkv[s, at + d]


@compiled
def turn(
    qkv: Any,
    q_norm_D: Any,
    k_norm_D: Any,
    eps: float,
    positions_S: Any,
    cos_PD: Any,
    sin_PD: Any,
    keys_KTD: Any,
    values_KTD: Any,
    slot: int,
    queries: Any,
) -> None:
    """`turn_rows`, for Python."""
    turn_rows(qkv, q_norm_D, k_norm_D, eps, positions_S, cos_PD, sin_PD, keys_KTD, values_KTD, slot, queries)


@inner
def _softmax(scores: Any, count: int) -> None:
    """The first `count` scores become weights that sum to one."""
    largest, total = MINUS_INFINITY, F(0)
    for i in range(count):
        largest = max(largest, scores[i])
    for i in range(count):
        scores[i] = exponential(scores[i] - largest)
        total += scores[i]
    for i in range(count):
        scores[i] /= total


@inner
def _mix(weights: Any, values_TD: Any, slots: Any, count: int, out_D: Any) -> None:
    """The weighted sum of the values in `slots`, added to `out_D`, four at a time to pass over `out_D` less often."""
    size = out_D.shape[0]
    fours = count // 4 * 4
    for i in range(0, fours, 4):
        a, b, c, e = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        t = np.int64(slots[i])
        if np.int64(slots[i + 3]) - t == 3:  # side by side, which compilers know how to read
            for d in range(size):
                out_D[d] += (
                    a * widen(values_TD[t, d])
                    + b * widen(values_TD[t + 1, d])
                    + c * widen(values_TD[t + 2, d])
                    + e * widen(values_TD[t + 3, d])
                )
        else:
            for d in range(size):
                out_D[d] += (
                    a * widen(values_TD[slots[i], d])
                    + b * widen(values_TD[slots[i + 1], d])
                    + c * widen(values_TD[slots[i + 2], d])
                    + e * widen(values_TD[slots[i + 3], d])
                )
    for i in range(fours, count):
        for d in range(size):
            out_D[d] += weights[i] * widen(values_TD[slots[i], d])


@inner
def _visible_slots(row: int, slot: int, num_rows: int, depth: int, visible_SW: Any, window: int, slots: Any) -> int:
    """Puts the slots that a row sees into `slots`, in order, and returns how many they are."""
    is_tree = visible_SW.shape[0] > 0
    stop = slot + num_rows - visible_SW.shape[1] if is_tree else slot + row + 1
    first = stop if is_tree else slot
    begin = min(max(0, first + depth + 1 - window), stop) if window > 0 else 0
    count = stop - begin
    for i in range(count):
        slots[i] = np.uintp(begin + i)
    if is_tree:
        for j in range(visible_SW.shape[1]):
            if visible_SW[row, j]:
                slots[count] = np.uintp(stop + j)
                count += 1
    return count


@inner
def attend_heads(
    queries: Any,
    keys_KTD: Any,
    values_KTD: Any,
    slot: int,
    depths_S: Any,
    visible_SW: Any,
    window: int,
    out: Any,
    begin: int,
    end: int,
) -> None:
    """Attention of rows that stand in the slots from `slot` on, over all slots before them and some of their own: that
    of the heads `begin` to `end`, counted through row after row.

    `queries` and `out` are `[S, H D]`. Row s is `depths_S[s]` positions behind the first new slot, or behind the tree's
    first slot; of the last W slots, the tree's, it sees those that `visible_SW` allows, and where that is empty itself
    and all before it. With `window` > 0 it sees so many positions, its own included.

    A row's result is the same to the last bit whoever stands beside it, alone, in a chain or on a branch: what it sees
    is taken in the same order by the same instructions.
    """
    num_kv, _, size = keys_KTD.shape
    num_rows = depths_S.shape[0]
    num_heads = queries.shape[1] // size
    group = num_heads // num_kv
    scale = F(1) / np.sqrt(F(size))
    query_D, mixed_D = np.empty(size, F), np.empty(size, F)
    scores, slots = np.empty(slot + num_rows, F), np.empty(slot + num_rows, np.uintp)
    row, count = -1, 0
    for unit in range(begin, end):
        s, h = unit // num_heads, unit % num_heads
        if s != row:
            row = s
            count = _visible_slots(s, slot, num_rows, depths_S[s], visible_SW, window, slots)
        k, at = h // group, h * size
        for d in range(size):
            query_D[d] = widen(queries[s, at + d]) * scale
            mixed_D[d] = F(0)
        for i in range(count):
            score = F(0)
            for d in range(size):
                score += query_D[d] * widen(keys_KTD[k, slots[i], d])
            scores[i] = score
        _softmax(scores, count)
        _mix(scores, values_KTD[k], slots, count, mixed_D)
        for d in range(size):
            out[s, at + d] = narrow(mixed_D[d], out[s, at + d])


LANES = 64


@compiled
def argmax(logits_SV: Any, out_S: Any) -> None:
    """Of every row the index of its greatest number, the first of several."""
    num_rows, size = logits_SV.shape
    whole = size // LANES * LANES
    greatest = np.empty(LANES, F)
    for s in range(num_rows):
        greatest[:] = MINUS_INFINITY
        for v in range(0, whole, LANES):
            for n in range(LANES):
                greatest[n] = max(greatest[n], widen(logits_SV[s, v + n]))
        largest = MINUS_INFINITY
        for n in range(LANES):
            largest = max(largest, greatest[n])
        for v in range(whole, size):
            largest = max(largest, widen(logits_SV[s, v]))
        found = 0
        while found < size - 1 and not widen(logits_SV[s, found]) >= largest:
            found += 1
        out_S[s] = found


NO_DEPTH = np.zeros(1, dtype=np.int64)
NO_TREE = np.zeros((0, 0), dtype=np.bool_)


@compiled
def attend_in_slots(
    qkv: Any,
    q_norm_D: Any,
    k_norm_D: Any,
    eps: float,
    lengths_B: Any,
    cos_PD: Any,
    sin_PD: Any,
    keys_BKTD: Any,
    values_BKTD: Any,
    window: int,
    queries: Any,
    out: Any,
) -> None:
    """`turn` and attention for one row in each of B caches, of which row b's is `lengths_B[b]` long."""
    for b in range(lengths_B.shape[0]):
        row, length = slice(b, b + 1), lengths_B[b]
        keys_KTD, values_KTD = keys_BKTD[b], values_BKTD[b]
        turn_rows(
            qkv[row],
            q_norm_D,
            k_norm_D,
            eps,
            lengths_B[row],
            cos_PD,
            sin_PD,
            keys_KTD,
            values_KTD,
            length,
            queries[row],
        )
        num_heads = queries.shape[1] // keys_KTD.shape[2]
        attend_heads(queries[row], keys_KTD, values_KTD, length, NO_DEPTH, NO_TREE, window, out[row], 0, num_heads)
