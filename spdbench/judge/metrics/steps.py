"""What steps tell beyond their sums: times between tokens, and verdicts by the position of the draft.

`rows` [R] chooses runs of a table throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.definitions import Steps
from spdbench.judge.results.schema import Drafts, RunKey
from spdbench.judge.results.table import COLUMN, STEP_COLUMNS, RunTable

NS_PER_S = 1e9
PERCENTS = (50, 95, 99)
"""Percentiles of times between tokens that are shown."""
MAX_TOKENS = np.iinfo(np.uint16).max
"""Ids in one chunk, as far as percentiles of times between tokens count them."""
RUNS_AT_ONCE = 1024
"""Intermediate arrays have 64 bits a step; taking a limited number of runs keeps their memory flat."""
EMITTED, JUDGED, ACCEPTED = (STEP_COLUMNS.index(name) for name in ("emitted", "judged", "accepted"))

Rows = NDArray[np.bool_]
DraftOutcome = Literal["accepted", "rejected", "filling"]
"""What came out of a pipeline's cycle; nothing while it fills."""


def token_intervals(table: RunTable, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.uint16], NDArray[np.int64]]:
    """Times between tokens of the chosen runs, end to end.

    A chunk of k ids that comes dt after the chunk before it counts k times dt / k. Steps that commit nothing (a pipe
    that fills) belong to the chunk that follows them.

    Returns:
        Seconds [K], the tokens [K] that each of them counts for, and how many of the K are each chosen run's.
    """
    steps = np.repeat(rows, table.num_steps)
    emitted, gaps_ns, num_steps = table.steps[EMITTED, steps], table.gaps_ns[steps], table.num_steps[rows]
    ends = np.cumsum(num_steps)
    parts = []
    for start in range(0, max(len(num_steps), 1), RUNS_AT_ONCE):
        block = slice(start, start + RUNS_AT_ONCE)
        first, last = (ends[block.start - 1] if start else 0), ends[block][-1:].sum()
        parts.append(_intervals_of(num_steps[block], emitted[first:last], gaps_ns[first:last]))
    seconds, tokens, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return seconds, tokens, counts


def _intervals_of(
    num_steps: NDArray[np.int64], emitted: NDArray[np.integer], gaps_ns: NDArray[np.integer]
) -> tuple[NDArray[np.float32], NDArray[np.uint16], NDArray[np.int64]]:
    t_ns = np.cumsum(gaps_ns, dtype=np.int64)  # goes on from run to run, but only differences within one are used
    chunks = np.flatnonzero(emitted)
    run = np.repeat(np.arange(len(num_steps)), num_steps)[chunks]
    later = run[1:] == run[:-1]
    tokens = emitted[chunks[1:]][later].astype(np.int64)
    seconds = np.diff(t_ns[chunks])[later] / NS_PER_S / tokens
    counts = np.bincount(run[1:][later], minlength=len(num_steps))
    return seconds.astype(np.float32), np.minimum(tokens, MAX_TOKENS).astype(np.uint16), counts


def percentiles(
    values: NDArray[np.floating], weights: NDArray[np.integer], counts: Sequence[int] | NDArray[np.integer]
) -> NDArray[np.float64]:
    """`PERCENTS` of each group's values as if each occurred as often as its weight: [G, percents], NaN without values.

    The groups' `values` and `weights` [K] lie end to end, `counts` [G] of each. A percentile is the smallest value that
    covers the share: numpy's `inverted_cdf` on the repeated values, without repeating them.
    """
    counts = np.asarray(counts)
    found = np.full((len(counts), len(PERCENTS)), np.nan)
    has = np.flatnonzero(counts)
    # With millions of chunks, a second key and copies are what costs time and memory.
    one = len(counts) == 1
    order = np.argsort(values) if one else np.lexsort((values, np.repeat(np.arange(len(counts)), counts)))
    covered = weights[order].astype(np.int64)
    np.cumsum(covered, out=covered)
    ends = covered[np.cumsum(counts[has]) - 1]
    before = np.concatenate(([0], ends[:-1]))
    for column, percent in enumerate(PERCENTS):
        ranks = before + -(-percent * (ends - before) // 100)
        found[has, column] = values[order[np.searchsorted(covered, ranks)]]
    return found


def verdicts_by_position(table: RunTable, rows: Rows, steps: Steps) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Drafts judged, and drafts accepted, at positions 1, 2, ...: [K] each; from runs whose engines report them, where
    only those know.

    A draft's position is its depth; in a pipeline, the number of verdicts since the last flush.
    """
    if steps == "reported":
        known = [drafts for drafts in _reported(table, rows) if drafts.judged_at is not None]
        judged_at = _sum_of_lists([drafts.judged_at or () for drafts in known])
        accepted_at = _sum_of_lists([_accepted_at(drafts.rounds_accepting or ()) for drafts in known])
        accepted_at = np.append(accepted_at, np.zeros(max(0, len(judged_at) - len(accepted_at)), dtype=np.int64))
        return judged_at, accepted_at[: len(judged_at)]
    chosen = _decode_steps(table, rows)
    judged, accepted = table.steps[JUDGED], table.steps[ACCEPTED]
    if steps == "pipeline":
        given = np.flatnonzero(chosen & ((judged > 0) | (table.steps[EMITTED] > 0)))
        run = np.repeat(np.arange(len(rows)), table.num_steps)[given]
        return _verdicts_since_flush(run, judged[given] > 0, accepted[given].astype(np.int64))
    if steps == "draft_verify":
        most = int(judged[chosen].max(initial=0))
        return _reaching(judged[chosen], most), _reaching(accepted[chosen], most)
    nothing = np.zeros(0, dtype=np.int64)
    return nothing, nothing


def _verdicts_since_flush(
    run: NDArray[np.int64], judged: NDArray[np.bool_], accepted: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """From cycles with a verdict or a token: their run, whether there was a verdict, and whether it accepted.

    The pipe is flushed by a token that is no accepted draft, also where there was no draft to reject.
    """
    after_flush = np.ones(len(run), dtype=np.bool_)
    after_flush[1:] = (run[1:] != run[:-1]) | (accepted[:-1] == 0)
    before: NDArray[np.int64] = np.cumsum(judged) - judged
    position = (before - np.maximum.accumulate(np.where(after_flush, before, 0)))[judged]
    accepted = accepted[judged]
    size = int(position.max(initial=-1)) + 1
    accepted_at = np.zeros(size, dtype=np.int64)
    np.add.at(accepted_at, position, accepted)
    return np.bincount(position, minlength=size), accepted_at


def _reaching(depths: NDArray[np.integer], most: int) -> NDArray[np.int64]:
    """How many of `depths` are at least 1, at least 2, ..., at least `most`."""
    counts = np.bincount(depths, minlength=most + 1)
    return np.cumsum(counts[::-1])[::-1][1:]


def _reported(table: RunTable, rows: Rows) -> Iterator[Drafts]:
    """What engines counted of the chosen runs."""
    return (drafts for drafts, chosen in zip(table.drafts, rows, strict=True) if chosen and drafts is not None)


def _accepted_at(rounds_accepting: Sequence[int]) -> list[int]:
    """Drafts accepted at depth 1, 2, ...: the rounds that accepted as many or more."""
    return list(accumulate(reversed(rounds_accepting[1:])))[::-1]


def _sum_of_lists(lists: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """The sum at each place of lists of any length."""
    return np.array([sum(column) for column in zip_longest(*lists, fillvalue=0)], dtype=np.int64)


def step_lengths(table: RunTable, rows: Rows, steps: Steps) -> NDArray[np.int64]:
    """How many decode steps committed 0, 1, 2, ... ids; prefill is none of them. As engines report it where only those
    know: a verify step then counts with all that it accepted, and one token of the target's own."""
    if steps == "reported":
        accepting = _sum_of_lists([drafts.rounds_accepting or () for drafts in _reported(table, rows)])
        return np.append(0, accepting).astype(np.int64)
    return np.bincount(table.steps[EMITTED, _decode_steps(table, rows)])


def step_lengths_by_context(table: RunTable, rows: Rows) -> dict[int, NDArray[np.int64]]:
    """`step_lengths` by the tokens of context that a step began with, prompt included.

    Returns:
        By the power of two that is at least as large as the context and less than twice as large, ascending.
    """
    emitted = table.steps[EMITTED].astype(np.int64)
    behind = np.cumsum(emitted) - emitted  # ids before each step, those of earlier runs included
    first = (table.ends - table.num_steps)[table.num_steps > 0]
    prompt_tokens = table.sums[:, COLUMN["prompt_tokens"]].astype(np.int64)
    of_run = (prompt_tokens[table.num_steps > 0] - behind[first]).repeat(table.num_steps[table.num_steps > 0])
    chosen = _decode_steps(table, rows)
    context = np.maximum((behind + of_run)[chosen], 1)
    below = 2 ** np.ceil(np.log2(context)).astype(np.int64)
    return {int(size): np.bincount(emitted[chosen][below == size]) for size in np.unique(below)}


class Cycle(NamedTuple):
    """One step of a pipeline: from `start_s` to `end_s` since the request's start, and the verdict that it gave."""

    start_s: float
    end_s: float
    verdict: DraftOutcome


def cycles_around_rejection(table: RunTable, rows: Rows, before: int, after: int) -> tuple[RunKey, list[Cycle]] | None:
    """The request and its cycles around a typical rejection of a pipeline; None without any rejection.

    Typical: the first rejection with an accepted draft in the cycle before it, else the first of all.
    """
    rejections = _decode_steps(table, rows) & (table.steps[JUDGED] > table.steps[ACCEPTED])
    if not rejections.any():
        return None
    settled = rejections & np.append(False, table.steps[ACCEPTED][:-1] > 0)
    at = int(np.flatnonzero(settled if settled.any() else rejections)[0])
    row = int(np.searchsorted(table.ends, at, side="right"))
    first = int(table.ends[row] - table.num_steps[row])
    ends_s = np.cumsum(table.gaps_ns[first : table.ends[row]].astype(np.int64)) / NS_PER_S
    shown = range(max(first + 1, at - before), min(int(table.ends[row]), at + after + 1))
    cycles = [
        Cycle(float(ends_s[step - first - 1]), float(ends_s[step - first]), _verdict(table, step)) for step in shown
    ]
    return table.keys[row], cycles


def _verdict(table: RunTable, step: int) -> DraftOutcome:
    if not table.steps[JUDGED, step]:
        return "filling"
    return "accepted" if table.steps[ACCEPTED, step] else "rejected"


def _decode_steps(table: RunTable, rows: Rows) -> NDArray[np.bool_]:
    """Which steps of the chosen runs are not their prefill: [S]."""
    chosen: NDArray[np.bool_] = np.repeat(rows, table.num_steps)
    chosen[(table.ends - table.num_steps)[table.num_steps > 0]] = False
    return chosen
