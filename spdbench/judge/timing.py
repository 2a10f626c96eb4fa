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

Decode tokens/s are judged alike. They inform, and decide only where no speed-up can be told.

Must not know files or how findings are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from spdbench.judge import stats
from spdbench.judge.counterpart import Pair
from spdbench.judge.recording import speeds
from spdbench.judge.result import Result, RunKey
from spdbench.judge.verdict import Finding, Verdict
from spdbench.judge.workload import machine

SPEEDUP: Final = "speedup"
SPEED: Final = "decode_tokens_per_s"
Allowed = Callable[[str], float]
"""Metric -> the share that it may fall by."""


def timing(pair: Pair, reference: Pair | None, allowed: Allowed, *, decides_alone: bool) -> Iterator[Finding]:
    """Findings on the runs that pair. `reference` is the plain decoding of both runs, if both have it; without it
    tokens/s decide if `decides_alone`."""
    if (why := _other_machine(pair)) is not None:
        yield Finding("timing", SPEED if reference is None else SPEEDUP, "not comparable", why)
        return
    if not pair.keys:
        return
    if reference is not None:
        yield _speedup(pair, reference, allowed(SPEEDUP))
    yield _speed(pair, allowed(SPEED), decides=reference is None and decides_alone)


def _other_machine(pair: Pair) -> str | None:
    """Why times of the two may not be held against each other; None if they may."""
    old, new = pair.baseline.head, pair.candidate.head
    unknown = None in (old.environment.get("fingerprint"), new.environment.get("fingerprint"))
    if unknown or machine(old) != machine(new):
        return (
            f"the baseline was measured on another machine or software ({_machine_name(old)}, now "
            f"{_machine_name(new)}); measure it here, or use --gate exact"
        )
    if old.backend.devices != new.backend.devices:
        return f"the baseline ran on {', '.join(old.backend.devices)}, now on {', '.join(new.backend.devices)}"
    return None


def _machine_name(head: Result) -> str:
    return str(head.environment.get("fingerprint") or "unknown")[:8]


def _speedup(pair: Pair, reference: Pair, allowed: float) -> Finding:
    shared = set(reference.keys)
    keys = [key for key in pair.keys if key in shared]
    before = np.hstack([speeds(reference.baseline, keys), speeds(pair.baseline, keys)])
    now = np.hstack([speeds(reference.candidate, keys), speeds(pair.candidate, keys)])
    interval = stats.double_ratio_interval(*_cells(keys), before, now)
    return _judged(SPEEDUP, _ratio(before), _ratio(now), interval, allowed, decides=True)


def _speed(pair: Pair, allowed: float, *, decides: bool) -> Finding:
    before, now = speeds(pair.baseline, pair.keys), speeds(pair.candidate, pair.keys)
    interval = stats.paired_ratio_interval(*_cells(pair.keys), before, now)
    return _judged(SPEED, _rate(before), _rate(now), interval, allowed, decides=decides)


def _cells(keys: Sequence[RunKey]) -> tuple[list[str], list[int]]:
    return [key[0] for key in keys], [key[2] for key in keys]


def _rate(columns: NDArray[np.float64]) -> float | None:
    """Ratio of the sums of two columns; None where it has none."""
    tokens, seconds = columns.sum(axis=0)
    return float(tokens / seconds) if tokens and seconds else None


def _ratio(columns: NDArray[np.float64]) -> float | None:
    """The second pair's rate over the first pair's."""
    reference, own = _rate(columns[:, :2]), _rate(columns[:, 2:])
    return None if reference is None or own is None else own / reference


def _judged(
    metric: str,
    before: float | None,
    now: float | None,
    interval: stats.Interval | None,
    allowed: float,
    *,
    decides: bool,
) -> Finding:
    change = None if before is None or now is None else now / before
    verdict, reason = decide(change, interval, allowed)
    return Finding("timing", metric, verdict, reason, before, now, change, interval, allowed, decides=decides)


def decide(change: float | None, interval: stats.Interval | None, allowed: float) -> tuple[Verdict, str]:
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


MORE = "measure more prompts (--limit) or --repeats, on an idle machine"
