"""The exact gate for servers and engines that give text alone: acceptance, scores and lengths, with intervals.

Equal texts, or ids where a server lists them, are no fair test of such an engine: requests that share a batch round
differently, so that a tie falls the other way and takes the rest of an answer with it. What is known of acceptance and
quality is therefore judged by its size AND its 95 % interval. With s the share that may be lost:

| change, estimate  | change, interval | verdict      |
|-------------------|------------------|--------------|
| below 1 - s       | wholly below 1   | regression   |
| below 1 - s       | reaches 1        | inconclusive |
| above 1 / (1 - s) | wholly above 1   | improved     |
| otherwise         |                  | pass         |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.comparison.pairing import Pair, columns_of_rounds
from spdbench.judge.gate.verdict import Finding, GateVerdict
from spdbench.judge.metrics import stats
from spdbench.judge.results.table import RunTable

UNKNOWN = "the server reports no drafts; see what `spdbench backends` says of acceptance"


def served(pair: Pair, max_drop: float) -> Iterator[Finding]:
    """Findings on the runs that pair; `max_drop` is the share that acceptance and score may fall by."""
    yield _texts(pair)
    yield _acceptance(pair, max_drop)
    yield from _scores(pair, max_drop)
    found = _by_interval("num_new_tokens", pair, (("new_tokens", "runs"),) * 2, max_drop)
    yield Finding("exact", "num_new_tokens", "pass", "an answer, on average", found.before, found.now, decides=False)


def _texts(pair: Pair) -> Finding:
    num, differ = len(pair.keys), len(pair.with_other_ids)
    if not (pair.knows_texts or pair.knows_ids):
        return Finding("exact", "identical_outputs", "pass", "texts are unknown", decides=False)
    reason = (
        "every answer is the baseline's" if not differ else f"{differ} of {num} answers differ, which alone is no fault"
    )
    return Finding("exact", "identical_outputs", "pass", reason, num, num - differ, decides=False)


def _acceptance(pair: Pair, max_drop: float) -> Finding:
    """On the requests of which both know rounds: an answer of one token has none, and a server's counts may be unknown
    of a few."""
    columns = columns_of_rounds(pair.baseline), columns_of_rounds(pair.candidate)
    known = [
        table.columns(pair.keys, rounds)[:, 0] > 0 for table, (_, rounds) in zip(_tables(pair), columns, strict=True)
    ]
    if not np.any(known):
        return Finding("exact", "acceptance_length", "pass", UNKNOWN, decides=False)
    longer = [table.columns(pair.keys, "decode_tokens")[:, 0] > 0 for table in _tables(pair)]
    asked, both = np.any(longer, axis=0), np.all(known, axis=0)
    if 2 * both.sum() < asked.sum():
        which = "the baseline's run" if known[0].sum() < known[1].sum() else "this run"
        reason = f"known of {both.sum()} of {asked.sum()} requests of both, and of fewest in {which}: {UNKNOWN}"
        return Finding("exact", "acceptance_length", "not comparable", reason)
    found = _by_interval("acceptance_length", _only(pair, both), columns, max_drop, plus=1)
    return found if both.sum() >= asked.sum() else _of_some(found, int(both.sum()), int(asked.sum()))


def _scores(pair: Pair, max_drop: float) -> Iterator[Finding]:
    """On the requests that are scored on both sides."""
    scored = [table.columns(pair.keys, "scored")[:, 0] > 0 for table in _tables(pair)]
    both = np.all(scored, axis=0)
    if both.any():
        found = _by_interval("score", _only(pair, both), (("score", "scored"),) * 2, max_drop)
        some = np.any(scored, axis=0)
        yield found if np.array_equal(both, some) else _of_some(found, int(both.sum()), int(some.sum()))
    elif np.any(scored):
        which = "the baseline's run" if scored[1].any() else "this run"
        yield Finding("exact", "score", "not comparable", f"{which} has no scores of these answers")


def _only(pair: Pair, chosen: NDArray[np.bool_]) -> Pair:
    return replace(pair, keys=tuple(key for key, kept in zip(pair.keys, chosen, strict=True) if kept))


def _of_some(found: Finding, num: int, num_all: int) -> Finding:
    return replace(found, reason=f"{found.reason} (on {num} of {num_all} requests)")


def _by_interval(
    name: str, pair: Pair, columns: tuple[tuple[str, str], tuple[str, str]], max_drop: float, plus: int = 0
) -> Finding:
    """The finding on `plus` + the ratio of sums of two columns, those of the baseline and of this run, by the table
    above."""
    sides = [_columns(table, pair, names, plus) for table, names in zip(_tables(pair), columns, strict=True)]
    before, now = (float(side[:, 0].sum() / side[:, 1].sum()) for side in sides)
    interval = stats.ratio_interval(pair.keys, *sides)
    change = now / before if before else None
    verdict, reason = _decide(before, now, interval, max_drop)
    return Finding("exact", name, verdict, reason, before, now, change, interval, allowed=max_drop)


def _decide(before: float, now: float, interval: stats.Interval | None, max_drop: float) -> tuple[GateVerdict, str]:
    low, high = interval or (0.0, np.inf)
    if now < before * (1 - max_drop):
        if high < 1:
            return "regression", f"fell by more than {max_drop:.3g} of it"
        return "inconclusive", "seems to have fallen, but the interval reaches 1; measure more prompts (--limit)"
    if now * (1 - max_drop) > before and low > 1:
        return "improved", "rose; renew the baseline to hold it"
    return "pass", "as before" if now == before else "within what is allowed, or what chance explains"


def _tables(pair: Pair) -> tuple[RunTable, RunTable]:
    return pair.baseline.runs, pair.candidate.runs


def _columns(table: RunTable, pair: Pair, names: tuple[str, str], plus: int) -> NDArray[np.float64]:
    found = table.columns(pair.keys, *names)
    found[:, 0] += plus * found[:, 1]
    return found
