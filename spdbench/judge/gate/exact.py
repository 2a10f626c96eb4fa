"""The exact gate: everything of a run but its times, which any machine can judge.

Greedy in float32 nothing excuses a difference: ids and every step must be equal. Elsewhere (bfloat16, sampling) a tie
may fall the other way and take the rest of an answer with it, so that ids inform, and the number of tokens, that of
steps and acceptance may get worse by a small share. An output that its own run called a real divergence from plain
decoding is a regression anywhere.

| float32, greedy             | verdict                                                                  |
|-----------------------------|--------------------------------------------------------------------------|
| an output has other ids     | regression                                                               |
| ids and steps equal         | pass                                                                     |
| ids equal, steps not        | improved if acceptance, what was accepted and steps are no worse and     |
|                             | one is better, else regression; it holds once the baseline is renewed    |

Of an engine that gives text alone neither is known, and a server's ids depend on what else it answers at the time:
`served.py` judges these. docs/metrics.md, "Losslessness".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from spdbench.judge.comparison.pairing import Pair
from spdbench.judge.gate.served import served
from spdbench.judge.gate.verdict import Finding, GateVerdict, name_of
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.definitions import ratios_for
from spdbench.judge.results.schema import RunKey
from spdbench.judge.results.table import COLUMN, STEP_COLUMNS
from spdbench.types import first_difference

ACCEPTANCE = ("acceptance_rate", "acceptance_length", "tokens_per_cycle")
AS_ALLOWED = "within what is allowed"


def exact(pair: Pair, max_acceptance_drop: float) -> Iterator[Finding]:
    """Findings on the runs that pair. `max_acceptance_drop` is the share that acceptance may fall by, and that counts
    may change by, where ids may differ; where they may not, it is 0."""
    if not pair.keys:
        return
    served_by_both = pair.baseline.is_served and pair.candidate.is_served
    if served_by_both or not pair.knows_ids:
        if not served_by_both and (pair.baseline.knows_ids or pair.candidate.knows_ids):
            reason = "ids are known of one of the two only: the other is of an engine that gives text alone; "
            reason += "use --gate timing"
            yield Finding("exact", "identical_outputs", "not comparable", reason)
            return
        yield from served(pair, max_acceptance_drop)
        if pair.candidate.head.divergence is not None:
            yield _divergence(pair.candidate)
        return
    yield _outputs(pair)
    if pair.candidate.head.divergence is not None:
        yield _divergence(pair.candidate)
    if pair.is_strict:
        yield _steps(pair)
    else:
        yield from _counts(pair, max_acceptance_drop)
    yield from _acceptance(pair, 0.0 if pair.is_strict else max_acceptance_drop)


def _outputs(pair: Pair) -> Finding:
    differ = pair.with_other_ids
    verdict: GateVerdict = "regression" if differ and pair.is_strict else "pass"
    reason = "every output is the baseline's, token for token"
    if differ:
        old, new = (each.runs.output_of(differ[0]) for each in (pair.baseline, pair.candidate))
        at = first_difference(old, new)
        reason = f"{_count(differ, pair.keys)} outputs differ, the first at token {at} of {name_of(differ[0])}"
        if not pair.is_strict:
            reason += "; outside of greedy float32 that alone is no fault"
    num_same = len(pair.keys) - len(differ)
    return Finding("exact", "identical_outputs", verdict, reason, len(pair.keys), num_same, decides=pair.is_strict)


def _divergence(candidate: LoadedResult) -> Finding:
    """What `run` found when it compared outputs with plain decoding's, over all prompts together."""
    found = candidate.head.divergence
    assert found is not None
    num_compared = sum(found.counts.values())
    if found.real:
        verdict: GateVerdict = "regression"
        reason = f"{found.real} of {num_compared} outputs are not plain decoding's, by more than a tie excuses"
    elif found.unclassified:
        verdict, reason = (
            "inconclusive",
            f"{found.unclassified} outputs are not plain decoding's, and not yet classified",
        )
    else:
        verdict, reason = "pass", "no output differs from plain decoding's by more than a tie"
    return Finding("exact", "real_divergences", verdict, reason, now=found.real)


def _sums(pair: Pair, *columns: str) -> list[tuple[int, int]]:
    """Of each of the `columns`, the sum over the runs that pair: before, and now."""
    was, is_now = (each.runs.total(pair.keys) for each in (pair.baseline, pair.candidate))
    return [(int(was[COLUMN[name]]), int(is_now[COLUMN[name]])) for name in columns]


def _steps(pair: Pair) -> Finding:
    """Number of decode steps, and whether each step drafted, judged, accepted and emitted as much as before."""
    old, new = pair.baseline.runs, pair.candidate.runs
    differ = [key for key in pair.keys if not np.array_equal(old.steps_of(key), new.steps_of(key))]
    (before, now), accepted, judged = _sums(pair, "steps", "accepted", "judged")
    if not differ:
        return Finding("exact", "num_steps", "pass", "every step is as before", before, now)
    where = f"{name_of(differ[0])}, {_step_difference(pair, differ[0])}"
    reason = f"{_count(differ, pair.keys)} runs take other steps; {where}"
    acceptance_rose = accepted[1] * judged[0] - accepted[0] * judged[1]
    no_worse = acceptance_rose >= 0 and now <= before and accepted[1] >= accepted[0]
    is_better = no_worse and (acceptance_rose > 0 or now < before)
    return Finding("exact", "num_steps", "improved" if is_better else "regression", reason, before, now)


def _counts(pair: Pair, share: float) -> Iterator[Finding]:
    """Number of new tokens, which may neither grow nor shrink by more than `share`, and that of decode steps, where the
    steps are the engine's own and not what came over a connection at once."""
    (before, now), steps = _sums(pair, "new_tokens", "steps")
    other_length = abs(now - before) > share * before
    reason = f"answers end elsewhere: by more than {share:.3g} of all tokens" if other_length else AS_ALLOWED
    verdict: GateVerdict = "regression" if other_length else "pass"
    yield Finding("exact", "num_new_tokens", verdict, reason, before, now, allowed=share)
    if pair.candidate.metrics["num_steps"] is None:
        return
    before, now = steps
    verdict, reason = "pass", AS_ALLOWED
    if now > before * (1 + share):
        verdict, reason = "regression", f"more by over {share:.3g} of them"
    elif now < before * (1 - share):
        verdict, reason = "improved", "fewer; renew the baseline to hold it"
    yield Finding("exact", "num_steps", verdict, reason, before, now, allowed=share)


def _acceptance(pair: Pair, max_drop: float) -> Iterator[Finding]:
    backend = pair.candidate.head.backend
    defined = {} if backend.kind == "autoregressive" else ratios_for(backend, None)
    was, is_now = (each.runs.total(pair.keys) for each in (pair.baseline, pair.candidate))
    for name in ACCEPTANCE:
        if name not in defined:
            continue
        before, now = (float(defined[name].of(totals)) for totals in (was, is_now))
        if np.isfinite(before) and np.isfinite(now):
            yield _within(name, before, now, max_drop)
        elif np.isfinite(before):
            yield Finding("exact", name, "regression", "no draft came to a verdict any more", before, allowed=max_drop)


def _within(name: str, before: float, now: float, max_drop: float) -> Finding:
    """Regression below (1 - `max_drop`) of `before`, improved above its inverse."""
    change = now / before if before else None
    if now < before * (1 - max_drop):
        verdict: GateVerdict = "regression"
        reason = "fell" if not max_drop else f"fell by more than {max_drop:.3g} of it"
    elif now * (1 - max_drop) > before:
        verdict, reason = "improved", "rose; renew the baseline to hold it"
    else:
        verdict, reason = "pass", "as before" if now == before else AS_ALLOWED
    return Finding("exact", name, verdict, reason, before, now, change, allowed=max_drop)


def _step_difference(pair: Pair, key: RunKey) -> str:
    """`step 5: accepted 2, was 3`, where a run first differs."""
    old, new = (each.runs.steps_of(key) for each in (pair.baseline, pair.candidate))
    shared = min(old.shape[1], new.shape[1])
    columns, steps = np.nonzero(old[:, :shared] != new[:, :shared])
    if not len(steps):
        return f"{new.shape[1]} steps, were {old.shape[1]}"
    first = int(steps.min())
    column = int(columns[steps == first].max())  # of what differs in this step, the last is nearest to the verdict
    return f"step {first}: {STEP_COLUMNS[column]} {new[column, first]}, was {old[column, first]}"


def _count(some: Sequence[RunKey], every: Sequence[RunKey]) -> str:
    return f"{len(some)} of {len(every)}"
