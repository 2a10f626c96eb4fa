"""The timing gate: has a label become slower, by its speed-up over the plain decoding of its own run.

Plain decoding takes turns with it prompt by prompt, so that whatever the machine did to both cancels; what is judged is
(speed-up now) / (speed-up before), by its size AND by its 95 % interval. With s the slowdown that is allowed:

| change, estimate  | change, interval           | verdict      |
|-------------------|----------------------------|--------------|
| below 1 - s       | wholly below 1             | regression   |
| below 1 - s       | reaches 1                  | inconclusive |
| 1 - s or above    | reaches below (1 - s)^2    | inconclusive |
| above 1 / (1 - s) | wholly above 1             | improved     |
| otherwise         |                            | pass         |

A pass therefore rules out a slowdown of about twice s. The interval knows what differs between prompts and between
repeats, not what differs between one start of the command and the next; s has to cover that (`calibration.py`).

What slows both sides alike cancels only while the machine is roughly the same: on a busy machine a pipeline's many
processes get a larger share of it than plain decoding does. So where plain decoding itself runs at less than half or
more than twice its former speed, or other programs took another share of the machine than before, a regression or an
improvement is inconclusive, too.

Where s is the default, neither chosen nor calibrated, it does not cover what differs between two starts of the same
code. That is then taken to be as much as what differs within them: a regression needs an interval that lies below 1 - s
even when it is twice as wide, and is inconclusive otherwise.

Several baselines of a label count as one run that lasted longer, and so do several new results: a start of the command
has a speed of its own, which repeats within it do not average out. Baselines of other machines, or without all the
prompts, are omitted.

Decode tokens/s are judged alike. They inform, and decide only where there is no speed-up; without a calibration, which
shows how far the machine itself drifts, they say no more than inconclusive of a difference. Where its read bandwidth
fell or rose with them, it is the machine that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.comparison.pairing import Pair, same_machine
from spdbench.judge.gate.verdict import Finding, GateVerdict
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics import stats
from spdbench.judge.results.machine_load import BUSY_SHARE
from spdbench.judge.results.schema import Result, RunKey

SPEEDUP: Final = "speedup"
SPEED: Final = "decode_tokens_per_s"
OTHER_STATE = 2.0
"""How many times as fast, or as slow, plain decoding may be for its speed-ups to be comparable."""


class Allowance(NamedTuple):
    """The `share` that a metric may fall by, and where that comes from."""

    share: float
    basis: Literal["default", "given", "calibrated"]


Allowed = Callable[[str, int, int], Allowance]
"""Metric, number of new results and of baselines -> what it may fall by."""


class Comparison(NamedTuple):
    """A new result and one baseline; `plain` is the plain decoding of both of their runs, if both have it."""

    pair: Pair
    plain: Pair | None


def timing(news: Sequence[Sequence[Comparison]], allowed: Allowed, *, decides_alone: bool) -> Iterator[Finding]:
    """Findings on new results of one label on one machine, each compared with its baselines, the newest first:
    with those of this machine that lack no run that one of the new has. Without plain decoding anywhere, tokens/s
    decide if `decides_alone`. Later turns count where all have them: an answer may end otherwise, and then the next
    turn has another prompt."""
    first = news[0]
    keys = max((comparisons[0].pair.keys for comparisons in news), key=len)
    if not keys:
        return
    near = [[each for each in comparisons if _other_machine(each.pair) is None] for comparisons in news]
    used = [full for some in near if (full := [each for each in some if _has_all(each.pair, keys)])]
    held = [over for some in used if (over := [each for each in some if each.plain is not None])]
    if not used:
        metric = SPEED if all(each.plain is None for each in first) else SPEEDUP
        why = "no baseline of this machine has all the prompts" if near[0] else _other_machine(first[0].pair)
        yield Finding("timing", metric, "not comparable", why or "")
        return
    if held:
        plain = [[each.plain for each in comparisons if each.plain is not None] for comparisons in held]
        own = [[each.pair for each in comparisons] for comparisons in held]
        yield _finding(SPEEDUP, [plain, own], allowed(SPEEDUP, len(held), len(held[0])), decides=True)
    own = [[each.pair for each in comparisons] for comparisons in used]
    yield _finding(SPEED, [own], allowed(SPEED, len(used), len(used[0])), decides=not held and decides_alone)


def _has_all(pair: Pair, keys: Sequence[RunKey]) -> bool:
    """True if `pair` lacks none of the runs `keys`, but for later turns that both answered to other prompts."""
    lacking = set(keys) - set(pair.keys)
    first_turn = min(turn for _, turn, _ in keys)
    answered = set(pair.baseline.runs.answered) & set(pair.candidate.runs.answered)
    return all(key in answered and key[1] > first_turn for key in lacking)


def _other_machine(pair: Pair) -> str | None:
    """Why times of the two cannot be compared; None if they can."""
    old, new = pair.heads
    if not same_machine(old, new):
        return (
            f"the baseline was measured on another machine or software ({_machine_name(old)}, now "
            f"{_machine_name(new)}); measure it here, or use --gate exact"
        )
    if old.backend.devices != new.backend.devices:
        return f"the baseline ran on {', '.join(old.backend.devices)}, now on {', '.join(new.backend.devices)}"
    return None


def _machine_name(head: Result) -> str:
    return str(head.environment.get("fingerprint") or "unknown")[:8]


def _finding(metric: str, sides: Sequence[Sequence[Sequence[Pair]]], allowed: Allowance, *, decides: bool) -> Finding:
    """`sides` are the label's own pairs, by new result and then by baseline; for a speed-up after plain decoding's."""
    shared = set.intersection(*(set(each.keys) for news in sides for pairs in news for each in pairs))
    keys = [key for key in sides[-1][0][0].keys if key in shared]
    before = [_added_up([each.baseline for each in news[0]], keys) for news in sides]
    now = [_added_up([pairs[0].candidate for pairs in news], keys) for news in sides]
    interval = stats.ratio_interval(keys, *before, *now)
    was, is_now = (_speed_of(columns) for columns in (before, now))
    change = None if was is None or is_now is None else is_now / was
    verdict, reason = decide(change, interval, allowed.share)
    found = Finding("timing", metric, verdict, reason, was, is_now, change, interval, allowed.share, decides=decides)
    doubt = None
    if decides and verdict in ("regression", "improved"):
        state = None if len(sides) == 1 else _quotient(_rate(before[0]), _rate(now[0]))
        doubt = _doubt(found, allowed, state, sides[-1])
    return replace(found, verdict="inconclusive", reason=doubt) if doubt else found


def _doubt(found: Finding, allowed: Allowance, state: float | None, news: Sequence[Sequence[Pair]]) -> str | None:
    """Why the difference `found` may be none of the code; None if nothing speaks for that. `state` is by how much the
    speed of plain decoding changed; None where there is none."""
    old, new = [pair.baseline for pair in news[0]], [pairs[0].candidate for pairs in news]
    if state is None and allowed.basis != "calibrated":
        return f"{found.reason.partition(',')[0].partition(';')[0]}, but so may the machine have become; {CALIBRATE}"
    if state is not None and not 1 / OTHER_STATE <= state <= OTHER_STATE:
        return f"plain decoding itself runs at {state:.2g} times its former speed, {OTHER}"
    bandwidth = _quotient(old[0].read_bandwidth, new[0].read_bandwidth)
    same_way = (bandwidth < 1) == (found.verdict == "regression")
    if state is None and same_way and not 1 - allowed.share <= bandwidth <= 1 / (1 - allowed.share):
        return f"the machine reads its memory at {bandwidth:.2g} times its former speed, {OTHER}"
    was, is_now = (mean(each.metrics["busy_share"] or 0.0 for each in side) for side in (old, new))
    if abs(is_now - was) > BUSY_SHARE:
        return f"other work took {is_now:.0%} of the machine now, and {was:.0%} before, {OTHER}"
    if found.verdict == "regression" and allowed.basis == "default" and found.change and found.interval:
        widened = found.interval[1] ** 2 / found.change
        if widened >= 1 - allowed.share:
            return (
                f"seems slower by {1 - found.change:.1%}, but so may two starts of the same code be: without a "
                f"calibration the interval, twice as wide, has to lie below {1 - allowed.share:.3f}; {STARTS}"
            )
    return None


def _quotient(before: float | None, now: float | None) -> float:
    """`now` over `before`; 1 where one of them is missing or 0."""
    return now / before if before and now else 1.0


def _added_up(results: Sequence[LoadedResult], keys: Sequence[RunKey]) -> NDArray[np.float64]:
    """Decode tokens and seconds of each run, added up over `results`: [keys, 2]."""
    total: NDArray[np.float64] = np.sum([each.runs.rates(keys) for each in results], axis=0)
    return total


def _speed_of(sides: Sequence[NDArray[np.float64]]) -> float | None:
    """Tokens/s of the one side; of two, how many times as fast the second is as the first. None where a side has no
    tokens or no time."""
    rates = [rate for side in sides if (rate := _rate(side)) is not None]
    if len(rates) < len(sides):
        return None
    return rates[0] if len(rates) == 1 else rates[1] / rates[0]


def _rate(columns: NDArray[np.float64]) -> float | None:
    """Ratio of the sums of two columns; None where it has none."""
    tokens, seconds = columns.sum(axis=0)
    return float(tokens / seconds) if tokens and seconds else None


def decide(change: float | None, interval: stats.Interval | None, allowed: float) -> tuple[GateVerdict, str]:
    """The table above, and the words for it."""
    if change is None:
        return "inconclusive", "no tokens were decoded after the first"
    if interval is None:
        return "inconclusive", "one conversation gives no interval; measure more (--limit)"
    low, high = interval
    floor = 1 - allowed
    if change < floor:
        if high < 1:
            return "regression", f"slower by {1 - change:.1%}, and {allowed:.1%} is allowed"
        return "inconclusive", f"seems slower by {1 - change:.1%}, but the interval reaches 1; {MORE}"
    if low < floor**2:
        return "inconclusive", f"the interval reaches down to {low:.3f}, below {floor**2:.3f}; {MORE}"
    if change * floor > 1 and low > 1:
        return "improved", f"faster by {change - 1:.1%}; renew the baseline to hold it"
    return "pass", f"within {allowed:.1%}"


CALIBRATE = "only a calibration tells (--calibrate), or plain decoding of the same run (-b vanilla) in both folders"
OTHER = "so it is in another state; measure again when it is as it was, or the baseline anew"
STARTS = "--calibrate finds what is noise here, and several starts on each side show less of it"
MORE = "measure more prompts (--limit) or --repeats, on an idle machine"
