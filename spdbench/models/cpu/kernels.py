"""The kernels of a decoder layer between two matrix multiplications, for a few rows on a CPU: norm, gate and
rotary (`attention` has the rest); and the argmax and the best of logits.

A matrix multiplication over one row takes tens of microseconds; each torch operator next to it costs several more, and
a layer has some twenty-five of them. Each kernel does the same arithmetic in one pass over memory. `parallel_for` cuts
them by rows, and attention by heads.

A row's result has the same bits alone, in a chain or on a branch of a tree: what a row reads is taken in the same order
by the same instructions, whatever rows are next to it. So a draft is verified by exactly what decoding one token at a
time would have computed.

Importing this module needs numba; `layer_ops` does without it where it is missing.
Shapes: S rows, M width, F feed-forward width, H query heads, K kv heads, T slots, D head size, P positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from spdbench.models.cpu.compile import (
    F,
    exponential,
    in_order,
    inner,
    narrow,
    pointer_to,
    stack_memory,
    widen,
)

MINUS_INFINITY = F(-np.inf)
LANES = 64
"""Maxima that `argmax` keeps side by side, so that the search is vectorised."""
_lanes_memory = stack_memory(8 * LANES)
NO_DEPTH = np.zeros(1, dtype=np.int64)


@inner
def norm_rows(rows_SM: Any, weight_M: Any, eps: float, out_SM: Any, begin: int, end: int) -> None:
    """Rows `begin` to `end` over their root mean square, times the weight (Zhang and Sennrich, arXiv 1910.07467)."""
    width = rows_SM.shape[1]
    for s in range(begin, end):
        total = F(0)
        for m in range(width):
            total += widen(rows_SM[s, m]) * widen(rows_SM[s, m])
        scale = F(1) / np.sqrt(total / F(width) + F(eps))
        for m in range(width):
            out_SM[s, m] = narrow(_product(widen(rows_SM[s, m]), scale, widen(weight_M[m])), out_SM[s, m])


@in_order
def _product(a: Any, b: Any, c: Any) -> Any:
    return a * b * c


@in_order
def gate_rows(both_S2F: Any, out_SF: Any, begin: int, end: int) -> None:
    """silu(gate) * up of the rows `begin` to `end`, in which the gate comes before up; nothing is left of a gate below
    -87."""
    width = out_SF.shape[1]
    for s in range(begin, end):
        for f in range(width):
            x = widen(both_S2F[s, f])
            out_SF[s, f] = narrow(x / (F(1) + exponential(-x)) * widen(both_S2F[s, width + f]), out_SF[s, f])


@in_order
def _rotate_pair(low: Any, high: Any, d: int, half: int, cos_D: Any, sin_D: Any, out_D: Any) -> None:
    """Numbers d and d + `half` of a head, rotated; the sines carry the signs. `half` is the caller's, so that the
    compiler knows that loads and stores lie equally far apart: else the loop takes half as long again."""
    out_D[d] = narrow(low * widen(cos_D[d]) + high * widen(sin_D[d]), out_D[d])
    out_D[half + d] = narrow(high * widen(cos_D[half + d]) + low * widen(sin_D[half + d]), out_D[d])


@inner
def _rotate_head(head_D: Any, norm_D: Any, eps: float, cos_D: Any, sin_D: Any, out_D: Any) -> None:
    """One head, normalised unless `norm_D` is empty, rotated by its position's angles."""
    half = head_D.shape[0] // 2
    if norm_D.shape[0] == 0:
        for d in range(half):
            _rotate_pair(widen(head_D[d]), widen(head_D[half + d]), d, half, cos_D, sin_D, out_D)
        return
    total = F(0)
    for d in range(2 * half):
        total += widen(head_D[d]) * widen(head_D[d])
    scale = F(1) / np.sqrt(total / F(2 * half) + F(eps))
    for d in range(half):
        low = _product(widen(head_D[d]), scale, widen(norm_D[d]))
        high = _product(widen(head_D[half + d]), scale, widen(norm_D[half + d]))
        _rotate_pair(low, high, d, half, cos_D, sin_D, out_D)


@inner
def rotate_rows(
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
    begin: int,
    end: int,
) -> None:
    """Splits the rows `begin` to `end` of `qkv` `[S, (H + 2K) D]`: rotated queries go to `queries` `[S, H D]`, rotated
    keys and plain values to the slots from `slot` on. Head norms are empty where the model has none."""
    num_kv, _, size = keys_KTD.shape
    num_heads = queries.shape[1] // size
    for s in range(begin, end):
        cos_D, sin_D = cos_PD[positions_S[s]], sin_PD[positions_S[s]]
        for h in range(num_heads):
            at = h * size
            _rotate_head(qkv[s, at : at + size], q_norm_D, eps, cos_D, sin_D, queries[s, at : at + size])
        for k in range(num_kv):
            at = (num_heads + k) * size
            _rotate_head(qkv[s, at : at + size], k_norm_D, eps, cos_D, sin_D, keys_KTD[k, slot + s])
            at += num_kv * size
            for d in range(size):
                values_KTD[k, slot + s, d] = qkv[s, at + d]


@inner
def _argmax(logits_SV: Any, out_S: Any) -> None:
    """Of every row the index of its greatest number, the first of several; as in torch, NaN counts as the greatest."""
    num_rows, size = logits_SV.shape
    whole = size // LANES * LANES
    lanes_at = _lanes_memory()
    greatest = carray(pointer_to(lanes_at, 0, F(0)), LANES)
    odd = carray(pointer_to(lanes_at + 4 * LANES, 0, np.int32(0)), LANES)
    for s in range(num_rows):
        greatest[:] = MINUS_INFINITY
        odd[:] = 0
        for v in range(0, whole, LANES):
            for n in range(LANES):
                value = widen(logits_SV[s, v + n])
                greatest[n] = max(greatest[n], value)
                odd[n] |= np.int32(value != value)
        largest, num_odd = MINUS_INFINITY, 0
        for n in range(LANES):
            largest = max(largest, greatest[n])
            num_odd += odd[n]
        for v in range(whole, size):
            value = widen(logits_SV[s, v])
            largest = max(largest, value)
            num_odd += int(value != value)
        found = 0
        if num_odd:
            while widen(logits_SV[s, found]) == widen(logits_SV[s, found]):
                found += 1
        else:
            while found < size - 1 and not widen(logits_SV[s, found]) >= largest:
                found += 1
        out_S[s] = found


def argmax(logits_at: int, num_rows: int, size: int, out_at: int, is_float: int) -> None:
    """`_argmax` of rows at an address, in float32 if `is_float`, else in bfloat16."""
    out_S = carray(pointer_to(out_at, 0, np.int64(0)), num_rows)
    if is_float:
        _argmax(carray(pointer_to(logits_at, 0, F(0)), (num_rows, size)), out_S)
    else:
        _argmax(carray(pointer_to(logits_at, 0, np.uint16(0)), (num_rows, size)), out_S)


@inner
def _top_k(logits_SV: Any, values_SK: Any, ids_SK: Any, totals_S: Any) -> None:
    """Of every row the K greatest numbers, the greatest first and of equal ones the first, with their indices; and the
    sum of all e^(x - the greatest). A row that has fewer than K numbers above minus infinity, as NaN is not, ends with
    indices 0."""
    num_rows, size = logits_SV.shape
    last = values_SK.shape[1] - 1
    for s in range(num_rows):
        values_SK[s, :] = MINUS_INFINITY
        ids_SK[s, :] = 0
        for begin in range(0, size, LANES):
            end, least, is_any = min(begin + LANES, size), values_SK[s, last], np.int32(0)
            for v in range(begin, end):
                is_any |= np.int32(widen(logits_SV[s, v]) > least)
            if is_any:  # in few parts of a row; only these are looked at one by one
                for v in range(begin, end):
                    value, at = widen(logits_SV[s, v]), last
                    if value > values_SK[s, last]:
                        while at > 0 and value > values_SK[s, at - 1]:
                            values_SK[s, at], ids_SK[s, at] = values_SK[s, at - 1], ids_SK[s, at - 1]
                            at -= 1
                        values_SK[s, at], ids_SK[s, at] = value, v
        total = F(0)
        for v in range(size):
            total += exponential(widen(logits_SV[s, v]) - values_SK[s, 0])
        totals_S[s] = total


def top_k(
    logits_at: int, num_rows: int, size: int, count: int, values_at: int, ids_at: int, totals_at: int, is_float: int
) -> None:
    """`_top_k` of rows at an address, in float32 if `is_float`, else in bfloat16; values and totals are in float32."""
    values_SK = carray(pointer_to(values_at, 0, F(0)), (num_rows, count))
    ids_SK = carray(pointer_to(ids_at, 0, np.int64(0)), (num_rows, count))
    totals_S = carray(pointer_to(totals_at, 0, F(0)), num_rows)
    if is_float:
        _top_k(carray(pointer_to(logits_at, 0, F(0)), (num_rows, size)), values_SK, ids_SK, totals_S)
    else:
        _top_k(carray(pointer_to(logits_at, 0, np.uint16(0)), (num_rows, size)), values_SK, ids_SK, totals_S)
