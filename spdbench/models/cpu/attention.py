"""Attention of a few rows over the slots of a cache, compiled by numba.

As in `kernels`, a row's result has the same bits alone, in a chain or on a branch of a tree: a row's slots are listed
in rising order, and are taken in that order whatever is next to them.

Shapes: S rows, H query heads, K kv heads, T slots, D head size, W slots of a tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from spdbench.models.attention_context import NO_TREE
from spdbench.models.cpu.claims import begin_writing, end_writing
from spdbench.models.cpu.compile import (
    F,
    allocate,
    compiled,
    exponential,
    free,
    in_order,
    inner,
    narrow,
    pointer_to,
    widen,
)
from spdbench.models.cpu.head_vectors import CHUNK, HEADS_AT_ONCE, SLOTS_AT_ONCE, add_values, score_slots
from spdbench.models.cpu.kernels import MINUS_INFINITY, rotate_rows

NO_DEPTH = np.zeros(1, dtype=np.int64)


@inner
def _find_visible(row: int, slot: int, num_rows: int, depth: int, visible_SW: Any, window: int, slots: Any) -> int:
    """Puts the slots that a row sees into `slots`, in rising order, and returns how many there are.

    A tree's slots are the last W before `slot` + `num_rows`, and `depth` counts from the first of them; a chain's row
    sees every slot up to its own. A window cuts off what is too far back in either case.
    """
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
def _score_keys(query_D: Any, keys_TD: Any, slots: Any, count: int, scores: Any) -> None:
    """The products of a query with the keys of the first `count` slots; `slots` and `scores` have room for whole steps
    of `SLOTS_AT_ONCE`."""
    size = query_D.shape[0]
    if size % CHUNK == 0:
        for i in range(0, count, SLOTS_AT_ONCE):
            to = scores[i:].ctypes.data
            score_slots(query_D.ctypes.data, keys_TD.ctypes.data, slots[i:].ctypes.data, size, to, query_D[0])
        return
    for i in range(count):
        score = F(0)
        for d in range(size):
            score += widen(query_D[d]) * widen(keys_TD[slots[i], d])
        scores[i] = score


@inner
def _exponentials(scores: Any, count: int, scale: float) -> Any:
    """The first `count` scores become weights; returns their total, over which they are a softmax."""
    largest, total = MINUS_INFINITY, F(0)
    for i in range(count):
        largest = max(largest, scores[i])
    for i in range(count):
        scores[i] = exponential((scores[i] - largest) * scale)
        total += scores[i]
    return total


@in_order
def _plain_values(weights: Any, values_TD: Any, slots: Any, count: int, total: Any, sums_D: Any, out_D: Any) -> None:
    """What `add_values` computes for one head, for heads of any size; `sums_D` is memory in float32."""
    size = out_D.shape[0]
    for d in range(size):
        sums_D[d] = F(0)
    for i in range(count):
        for d in range(size):
            sums_D[d] += weights[i] * widen(values_TD[slots[i], d])
    for d in range(size):
        out_D[d] = narrow(sums_D[d] / total, out_D[d])


@inner
def _weigh_values(
    weights: Any, values_TD: Any, slots: Any, count: int, totals: Any, sums_D: Any, out: Any, num_heads: int
) -> None:
    """For the first `num_heads` heads of `weights`, `totals` and `out` `[H, D]`, the mean of the slots' values by the
    head's weights; `sums_D` is memory in float32."""
    size, like = out.shape[1], out[0, 0]
    if size % CHUNK != 0:
        for j in range(num_heads):
            _plain_values(weights[j], values_TD, slots, count, totals[j], sums_D, out[j])
        return
    at, slots_at, weights_at, head_bytes = (
        values_TD.ctypes.data,
        slots.ctypes.data,
        weights.ctypes.data,
        weights.strides[0],
    )
    totals_at, out_at = totals.ctypes.data, out.ctypes.data
    if num_heads == 1:
        add_values(at, slots_at, count, size, weights_at, head_bytes, totals_at, out_at, 1, like)
    elif num_heads == 2:
        add_values(at, slots_at, count, size, weights_at, head_bytes, totals_at, out_at, 2, like)
    elif num_heads == 3:
        add_values(at, slots_at, count, size, weights_at, head_bytes, totals_at, out_at, 3, like)
    else:
        add_values(at, slots_at, count, size, weights_at, head_bytes, totals_at, out_at, 4, like)


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
    status: int,
    token: int,
) -> None:
    """Attention of the new rows in the slots from `slot` on, for the heads `begin` to `end`, counted row after row.
    `status` and `token`: see `claims.begin_writing`.

    `queries` and `out` are `[S, H D]`. Row s is `depths_S[s]` positions behind the first new slot, or behind a tree's
    first slot; of the last W slots, the tree's, it sees those that `visible_SW` allows; without a tree (`visible_SW` is
    empty) itself and all slots before it. With `window` > 0 it sees so many positions, its own included.
    """
    num_kv, _, size = keys_KTD.shape
    num_rows = depths_S.shape[0]
    num_heads = queries.shape[1] // size
    group = num_heads // num_kv
    scale = F(1) / np.sqrt(F(size))
    # The slots that a row sees, 8 bytes each; then, for some heads, scores, totals, sums, and what is attended to.
    most = (slot + num_rows + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE * SLOTS_AT_ONCE
    memory = allocate(8 * most + 4 * (HEADS_AT_ONCE * (most + 1 + size) + size))
    slots = carray(pointer_to(memory, 0, np.uintp(0)), most)
    numbers = memory + 8 * most
    scores = carray(pointer_to(numbers, 0, F(0)), (HEADS_AT_ONCE, most))
    totals = carray(pointer_to(numbers, HEADS_AT_ONCE * most, F(0)), HEADS_AT_ONCE)
    sums_D = carray(pointer_to(numbers, HEADS_AT_ONCE * (most + 1), F(0)), size)
    attended_at = numbers + 4 * (HEADS_AT_ONCE * (most + 1) + size)
    attended = carray(pointer_to(attended_at, 0, queries[0, 0]), (HEADS_AT_ONCE, size))
    row, count, unit = -1, 0, begin
    while unit < end:
        s, h = unit // num_heads, unit % num_heads
        if s != row:
            row = s
            count = _find_visible(s, slot, num_rows, depths_S[s], visible_SW, window, slots)
            for i in range(count, min(most, count + SLOTS_AT_ONCE)):
                slots[i] = slots[count - 1]  # scored with the last ones, for nothing
        k, at = h // group, h * size
        some = min(HEADS_AT_ONCE, min(end - unit, group - h % group))
        for j in range(some):
            _score_keys(queries[s, at + j * size : at + (j + 1) * size], keys_KTD[k], slots, count, scores[j])
            totals[j] = _exponentials(scores[j], count, scale)
        _weigh_values(scores, values_KTD[k], slots, count, totals, sums_D, attended, some)
        if not begin_writing(status, token):
            break
        for j in range(some):
            for d in range(size):
                out[s, at + j * size + d] = attended[j, d]
        end_writing(status, token)
        unit += some
    free(memory)


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
    """`rotate_rows` and attention for one row in each of B caches, of which row b's is `lengths_B[b]` long."""
    num_heads = queries.shape[1] // keys_BKTD.shape[3]
    for b in range(lengths_B.shape[0]):
        row, length, keys, values = slice(b, b + 1), lengths_B[b], keys_BKTD[b], values_BKTD[b]
        rotate_rows(
            qkv[row], q_norm_D, k_norm_D, eps, lengths_B[row], cos_PD, sin_PD, keys, values, length, queries[row], 0, 1
        )
        attend_heads(queries[row], keys, values, length, NO_DEPTH, NO_TREE, window, out[row], 0, num_heads, 0, 0)
