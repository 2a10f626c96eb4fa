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
def _plain_scores(query_D: Any, keys_TD: Any, slots: Any, count: int, scores: Any) -> None:
    """What `score_slots` computes, for heads of any size."""
    size = query_D.shape[0]
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
    """What `add_values` computes, for heads of any size; `sums_D` is memory in float32."""
    size = out_D.shape[0]
    for d in range(size):
        sums_D[d] = F(0)
    for i in range(count):
        for d in range(size):
            sums_D[d] += weights[i] * widen(values_TD[slots[i], d])
    for d in range(size):
        out_D[d] = narrow(sums_D[d] / total, out_D[d])


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
    num_kv, capacity, size = keys_KTD.shape
    num_rows = depths_S.shape[0]
    num_heads = queries.shape[1] // size
    group = num_heads // num_kv
    scale = F(1) / np.sqrt(F(size))
    in_vectors = size % CHUNK == 0
    like, itemsize = queries[0, 0], queries.itemsize
    # The slots that a row sees, 8 bytes each; then, for some heads, scores, totals, and what is attended to.
    most = (slot + num_rows + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE * SLOTS_AT_ONCE
    scores_at, totals_at, sums_at, attended_at = 8 * most, (8 + 4 * HEADS_AT_ONCE) * most, 0, 0
    sums_at = totals_at + 4 * HEADS_AT_ONCE
    attended_at = sums_at + 4 * size
    memory = allocate(attended_at + 4 * HEADS_AT_ONCE * size)
    slots = carray(pointer_to(memory, 0, np.uintp(0)), most)
    scores = carray(pointer_to(memory + scores_at, 0, F(0)), (HEADS_AT_ONCE, most))
    totals = carray(pointer_to(memory + totals_at, 0, F(0)), HEADS_AT_ONCE)
    sums_D = carray(pointer_to(memory + sums_at, 0, F(0)), size)
    attended = carray(pointer_to(memory + attended_at, 0, like), HEADS_AT_ONCE * size)
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
        keys_at = keys_KTD.ctypes.data + k * capacity * size * itemsize
        values_at = values_KTD.ctypes.data + k * capacity * size * itemsize
        for j in range(some):
            if in_vectors:
                query_at = queries.ctypes.data + (s * num_heads + h + j) * size * itemsize
                for i in range(0, count, SLOTS_AT_ONCE):
                    score_at = memory + scores_at + 4 * (j * most + i)
                    score_slots(query_at, keys_at, memory + 8 * i, size, score_at, like)
            else:
                query_D = queries[s, at + j * size : at + (j + 1) * size]
                _plain_scores(query_D, keys_KTD[k], slots, count, scores[j])
            totals[j] = _exponentials(scores[j], count, scale)
        if in_vectors:
            _add_values(values_at, memory, count, size, scores_at, most, totals_at, attended_at, some, like)
        else:
            for j in range(some):
                out_D = attended[j * size : (j + 1) * size]
                _plain_values(scores[j], values_KTD[k], slots, count, totals[j], sums_D, out_D)
        if not begin_writing(status, token):
            break
        for d in range(some * size):
            out[s, at + d] = attended[d]
        end_writing(status, token)
        unit += some
    free(memory)


@inner
def _add_values(
    values_at: int,
    memory: int,
    count: int,
    size: int,
    scores_at: int,
    most: int,
    totals_at: int,
    attended_at: int,
    num_heads: int,
    like: Any,
) -> None:
    """`add_values` for up to `HEADS_AT_ONCE` heads. Places are counted from `memory` on, where the slots are."""
    weights, totals, out = memory + scores_at, memory + totals_at, memory + attended_at
    if num_heads == 1:
        add_values(values_at, memory, count, size, weights, 4 * most, totals, out, 1, like)
    elif num_heads == 2:
        add_values(values_at, memory, count, size, weights, 4 * most, totals, out, 2, like)
    elif num_heads == 3:
        add_values(values_at, memory, count, size, weights, 4 * most, totals, out, 3, like)
    else:
        add_values(values_at, memory, count, size, weights, 4 * most, totals, out, 4, like)


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
